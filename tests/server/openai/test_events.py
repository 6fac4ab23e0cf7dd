"""Server-sent events on the wire: headers, order, signs of life, slow and deaf readers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from streamkv.protocol.limits import SessionLimits
from streamkv.server.openai.sse import HEARTBEAT_S, Timing
from tests.server.openai.dialect import CHAT, COMPLETIONS, HELLO, door, door_of, parsed, post, stream, torn
from tests.server.serving import Serving, eventually


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 1000.0
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        entry = (self.now + delay, callback)
        self.due.append(entry)
        return _Entry(self, entry)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        ready, self.due = [e for e in self.due if e[0] <= self.now], [e for e in self.due if e[0] > self.now]
        for _, callback in ready:
            callback()

    def set_for(self, served: Serving) -> None:
        timing = Timing(10.0, clock=lambda: self.now, call_later=self.call_later)
        door_of(served)._generating._timing = timing


@dataclass
class _Entry:
    clock: Clock
    entry: Any

    def cancel(self) -> None:
        if self.entry in self.clock.due:
            self.clock.due.remove(self.entry)


async def test_headers_and_a_name_for_the_request():
    async with door() as served:
        body = {"messages": HELLO, "max_tokens": 2, "stream": True}
        async with served.http.post(served.base + CHAT, json=body, headers={"X-Request-Id": "mine-1"}) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"
            assert response.headers["X-Request-Id"] == "mine-1"
            parsed(await response.read())
        _, _, headers = await post(served, CHAT, {"messages": HELLO, "max_tokens": 2}, **{"X-Request-Id": "mine-2"})
        assert headers["X-Request-Id"] == "mine-2"
        for odd in ("a b", "x" * 129, "ä"):
            status, _, headers = await post(served, CHAT, {"messages": []}, **{"X-Request-Id": odd})
            assert status == 400
            assert len(headers["X-Request-Id"]) == 24, "what cannot be logged is replaced"


@pytest.mark.parametrize(("version", "copies"), [("1.0", 1), ("1.1", 1), ("1.1", 3)])
async def test_old_and_impatient_clients(version: str, copies: int):
    """HTTP/1.0 has no chunks: the end is the end of the connection. Requests sent ahead are answered in turn."""
    body = json.dumps({"prompt": "abc", "max_tokens": 3, "stream": True})
    lines = (
        f"POST {COMPLETIONS} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    async with door() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(("\r\n".join((*lines, "", "")) + body).encode() * copies)
        for _ in range(copies):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(f"HTTP/{version} 200 OK".encode())
            data = await reader.readuntil(b"[DONE]\n\n")
            assert (b"chunked" in head) == (version == "1.1")
            assert b"".join(part.split(b'"')[0] for part in data.split(b'"text":"')[1:]) == b"abc"
            assert await (reader.read() if version == "1.0" else reader.readexactly(7)) == (
                b"" if version == "1.0" else b"\r\n0\r\n\r\n"
            )
        await torn(writer)


async def test_nothing_goes_out_before_the_engine_has_taken_the_request():
    async with door() as served:
        served.engine.hold = 0
        for _ in range(2):
            async with served.http.post(served.base + CHAT, json={"messages": HELLO, "stream": True}) as response:
                assert response.status == 200, "the headers tell that it has been taken"
        status, body, _ = await post(served, CHAT, {"messages": HELLO, "stream": True, "logit_bias": {"299": 1, "300": 1}})
        assert (status, body["error"]["param"]) == (400, "logit_bias")


async def test_silence_has_a_sign():
    clock = Clock()
    async with door() as served:
        clock.set_for(served)
        served.engine.hold = 0
        async with served.http.post(
            served.base + COMPLETIONS, json={"prompt": "abc", "max_tokens": 5, "stream": True}
        ) as response:
            clock.pass_by(HEARTBEAT_S)
            assert await response.content.readany() == b": hb\n\n"
            clock.pass_by(HEARTBEAT_S - 1)
            await served.engine.release(2)
            while b'"text":"b"' not in await response.content.readuntil(b"\n\n"):
                pass
            clock.pass_by(1)  # 15 s after the first sign, but not after the last word
            await served.engine.release(3)
            assert b'"text":"c"' in await response.content.readuntil(b"\n\n")
            clock.pass_by(HEARTBEAT_S)
            assert await response.content.readuntil(b"\n\n") == b": hb\n\n"
            await served.engine.release()
            assert b"hb" not in await response.content.read()
        assert not clock.due, "a timer outlives its stream"


async def test_an_error_after_the_headers_is_an_event():
    async with door() as served:
        served.engine.fail_after = 2  # type: ignore[attr-defined]  # a KnowingEngine
        for body in ({"prompt": "abc", "max_tokens": 9}, {"prompt": "abc", "max_tokens": 9, "n": 3}):
            *before, error = await stream(served, COMPLETIONS, body)
            assert error == {
                "error": {
                    "message": "the model produced NaN for this request",
                    "type": "server_error",
                    "param": None,
                    "code": "numerical_error",
                }
            }
            assert "".join(chunk["choices"][0]["text"] for chunk in before if chunk["choices"][0]["index"] == 0) == "ab"
            await served.quiet()


async def test_a_lost_engine_ends_streams_and_refuses_requests():
    async with door() as served:
        served.engine.hold = 2
        streaming = asyncio.create_task(stream(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 9}))
        whole = asyncio.create_task(post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 9}))
        await eventually(lambda: [live.num_tokens for live in served.engine._live.values()] == [2, 2])
        await eventually(served.engine._batches.empty)
        await served.engine._batches.put(None)
        assert (await streaming)[-1]["error"]["code"] == "engine_lost"
        status, body, _ = await whole
        assert (status, body["error"]["code"]) == (503, "engine_lost")
        assert (await post(served, COMPLETIONS, {"prompt": "abc"}))[0] == 503
        served.engine._live.clear()


# -- slow readers ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def deaf(
    served: Serving, body: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Transport]]:
    """A client that has asked, with small buffers on both sides, and does not read; and the server's transport."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.connect(("127.0.0.1", served.server.port))
    own.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    data = json.dumps(body).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    served.engine.hold = 0
    seen: list[Any] = []
    answer = door_of(served)._generating.answer

    async def watched(request: Any, *rest: Any) -> Any:
        seen.append(request)
        return await answer(request, *rest)

    door_of(served)._generating.answer = watched  # type: ignore[method-assign]  # to see the server's side
    writer.write(head.encode() + data)
    await eventually(lambda: len(served.engine.live) == 1)
    transport = seen[0].transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
    try:
        yield reader, writer, transport
    finally:
        await torn(writer)


async def test_who_never_reads_is_aborted_when_a_send_takes_too_long():
    async with door(context=100_000, send_timeout_s=0.1) as served:
        async with deaf(served, {"prompt": "abc", "max_tokens": 60_000, "stream": True}):
            await served.engine.release()
            await eventually(lambda: door_of(served).closed)
        served.engine.hold = None
        assert (await post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 3}))[0] == 200


async def test_who_is_behind_by_too_much_text_is_aborted_at_once_and_text_is_merged_until_then():
    limits = SessionLimits(outbound=2048)
    body = {"prompt": "abc", "max_tokens": 60_000, "stream": True}
    async with door(context=100_000, limits=limits, send_timeout_s=600.0) as served, deaf(served, body):
        (generation,) = door_of(served).work._generations
        worst, pieces = 0, 0
        look = generation._sink

        def watched(events: Any) -> None:
            nonlocal worst, pieces
            look(events)
            worst, pieces = max(worst, generation._weight), max(pieces, len(generation._pieces))

        served.streams._streams[next(iter(served.streams._streams))].sink = watched
        await served.engine.release()
        await eventually(lambda: door_of(served).closed)
        assert 2048 < worst < 2048 + 64
        assert pieces == 1


async def test_a_slow_reader_gets_everything_merged():
    async with door(context=100_000, send_timeout_s=600.0) as served:
        async with deaf(served, {"prompt": "abc", "max_tokens": 3000, "stream": True}) as (reader, writer, _):
            await served.engine.release()
            await eventually(lambda: not served.engine.live)
            writer.transport.resume_reading()  # type: ignore[attr-defined]  # a socket's transport can
            data = b""
            while b"[DONE]" not in data:
                data += await reader.read(65536)
        chunks = [json.loads(line[6:]) for line in _dechunked(data).splitlines() if line.startswith(b"data: {")]
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(texts) == "abc" * 1000
        assert max(map(len, texts)) > 1, "nothing was merged"


def _dechunked(data: bytes) -> bytes:
    rest, whole = data.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        whole, rest = whole + rest[:length], rest[length + 2 :]
        if not length:
            break
    return whole


async def test_a_whole_answer_that_nobody_reads_is_aborted_too():
    body = {"prompt": "abc", "max_tokens": 60_000, "logprobs": 2}
    async with door(context=100_000, send_timeout_s=0.1) as served, deaf(served, body):
        await served.engine.release()
        await eventually(lambda: door_of(served).closed)


async def test_an_answer_that_fits_our_own_buffer_is_aborted_as_well_when_nobody_reads_it():
    body = {"prompt": "abc", "max_tokens": 30_000}  # less than the 64 KiB that a transport takes without a word
    async with door(context=100_000, send_timeout_s=0.1) as served, deaf(served, body) as (_, _, transport):
        await served.engine.release()
        await eventually(lambda: door_of(served).closed)
        assert transport.is_closing(), "the rest of the answer is nobody's any more"


async def test_who_reads_may_read_more_than_may_wait():
    async with door(context=100_000, limits=SessionLimits(outbound=2048)) as served:
        chunks = await stream(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 6000})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc" * 2000


async def test_a_whole_answer_has_a_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("streamkv.server.openai.generate.MAX_ANSWER", 5000)
    async with door(context=100_000) as served:
        assert (await post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 4000}))[0] == 200
        status, body, _ = await post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 90_000, "n": 2})
        assert (status, "stream it" in body["error"]["message"]) == (400, True)
        await served.quiet()
        assert (await post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 400, "logprobs": 9}))[0] == 400


# -- going away --------------------------------------------------------------------------------------------------------


async def test_drain_lets_streams_finish_and_refuses_new_requests():
    async with door(drain_timeout_s=50.0) as served:
        served.engine.hold = 2
        streaming = asyncio.create_task(stream(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 9}))
        whole = asyncio.create_task(post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 9}))
        await eventually(lambda: len(served.engine.live) == 2)
        draining = asyncio.create_task(served.server.drain("a test"))
        await eventually(lambda: door_of(served)._draining)
        for path in (CHAT, COMPLETIONS, "/tokenize"):
            status, body, headers = await post(served, path, {"prompt": "abc", "messages": HELLO})
            assert (status, body["error"]["code"]) == (503, "draining")
            assert headers["Connection"] == "close"
        assert not draining.done()
        await served.engine.release()
        assert "".join(chunk["choices"][0]["text"] for chunk in await streaming) == "abc" * 3
        assert (await whole)[1]["choices"][0]["text"] == "abc" * 3
        assert await draining is True


@pytest.mark.parametrize("streamed", [True, False])
async def test_drain_ends_what_does_not_finish_in_time(streamed: bool):
    async with door(drain_timeout_s=0.05) as served:
        served.engine.hold = 2
        body = {"prompt": "abc", "max_tokens": 9}
        if streamed:
            asking = asyncio.create_task(stream(served, COMPLETIONS, body))
        else:
            asking = asyncio.create_task(post(served, COMPLETIONS, body))  # type: ignore[arg-type]  # either answer
        await eventually(lambda: [live.num_tokens for live in served.engine._live.values()] == [2])
        assert await served.server.drain("the server is shutting down") is False
        assert door_of(served).closed
        answer: Any = await asking
        error = answer[-1]["error"] if streamed else answer[1]["error"]
        assert error["code"] == "draining"
        assert "not complete: the server is shutting down" in error["message"]
        assert streamed or answer[0] == 503


async def test_requests_beyond_the_limit_are_told_when_to_come_again():
    async with door(max_connections=2) as served:
        served.engine.hold = 0
        held = [asyncio.create_task(post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 1})) for _ in range(2)]
        await eventually(lambda: len(served.engine.live) == 2)
        status, body, headers = await post(served, COMPLETIONS, {"prompt": "abc"})
        assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "overloaded", "1")
        await served.engine.release()
        assert [status for status, _, _ in await asyncio.gather(*held)] == [200, 200]

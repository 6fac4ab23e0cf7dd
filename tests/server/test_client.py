"""`streamkv.client` against a real server, and against servers that are wrong, silent or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from streamkv.client import ClientConnectionError, RemoteError, connect
from streamkv.errors import InvalidRequestError
from tests.server.serving import DEADLINE_S, Serving, eventually, serving

CODECS = ["json", "msgpack"]
HELLO = [{"role": "user", "content": "hello"}]


def live(served: Serving) -> int:
    return len(served.engine.live)


@pytest.fixture(autouse=True)
async def nothing_hangs() -> AsyncIterator[None]:
    async with asyncio.timeout(DEADLINE_S):
        yield


@pytest.mark.smoke
@pytest.mark.parametrize("codec", CODECS)
async def test_deltas_come_in_order_and_join_to_the_text(codec: Any):
    async with serving() as served, connect(served.url, codec=codec) as client:
        assert client.welcome is not None
        assert client.welcome.models == ["fake"]
        stream = client.complete("abc", max_tokens=50)
        pieces = []
        offset = 0
        async for delta in stream:
            assert delta.o == offset
            offset += delta.n
            pieces.append(delta.x)
        assert "".join(pieces) == stream.text == ("abc" * 20)[:50]
        assert stream.done is not None
        assert (stream.done.finish_reason, stream.done.usage.completion, stream.num_tokens) == ("length", 50, 50)
        assert await stream.result() == stream.text, "the result can be asked for again"


async def test_chat_speaks_the_template():
    async with serving() as served, connect(served.url) as client:
        stream = client.chat(HELLO, max_tokens=40, skip_special_tokens=False)
        assert await stream.result() == ("<|user|>hello<|end|><|assistant|>" * 5)[: len(stream.text)]
        assert stream.num_tokens == 40


@pytest.mark.parametrize("codec", CODECS)
async def test_streams_run_side_by_side(codec: Any):
    async with serving() as served, connect(served.url, codec=codec) as client:
        streams = [client.complete(f"{index} ", max_tokens=30) for index in range(20)]
        texts = await asyncio.gather(*(stream.result() for stream in streams))
        assert texts == [(f"{index} " * 30)[:30] for index in range(20)]


async def test_samples_share_one_prompt():
    async with serving(reply=lambda _request, branch, _position: ord("a") + branch) as served, connect(served.url) as client:
        streams = client.samples(3, HELLO, max_tokens=4)
        assert [await stream.result() for stream in streams] == ["aaaa", "bbbb", "cccc"]
        assert served.tokenizer.calls == 1


async def test_fields_of_the_message_do_not_get_into_the_body():
    trace = "0af7651916cd43dd8448eb211c80319c"
    with capture_logs() as logs:
        async with serving() as served, connect(served.url) as client:
            outer: Any = {"priority": 7, "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            stream = client.complete("abc", max_tokens=3, **outer)
            await stream.result()
            (fork,) = stream.fork(at=1, **outer)
            await fork.result()
            assert [request.priority for request in served.engine.requests] == [7, 7]
    assert [line["trace_id"] for line in logs if line["event"] == "stream_finished"] == [trace, trace]


async def test_cancel_keeps_the_text_so_far():
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 4
        stream, other = client.complete("abc", max_tokens=100), client.complete("xyz", max_tokens=100)
        async for _ in stream:
            if stream.num_tokens == 4:
                await stream.cancel()
        assert stream.text == "abca"
        assert stream.done is not None
        assert stream.done.finish_reason == "cancelled"
        await stream.cancel()
        assert live(served) == 1
        await served.engine.release()
        assert len(await other.result()) == 100


async def test_cancel_straight_after_the_request_does_not_overtake_it():
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 0
        stream = client.complete("abc", max_tokens=100)
        await stream.cancel()
        assert await stream.result() == ""
        assert stream.done is not None
        assert stream.done.finish_reason == "cancelled"
        await served.quiet()


async def test_leaving_the_block_of_a_stream_cancels_it():
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 4
        async with client.complete("abc", max_tokens=100) as stream:
            async for _ in stream:
                break
        assert (await stream.result())[:1] == "a"
        await served.quiet()


async def test_leaving_the_connection_cancels_what_runs():
    async with serving() as served:
        served.engine.hold = 2
        async with connect(served.url) as client:
            stream = client.complete("abc", max_tokens=100)
            await eventually(lambda: live(served) == 1)
        await served.quiet()
        with pytest.raises(ClientConnectionError):
            await stream.result()


@pytest.mark.parametrize(
    ("ask", "code", "param"),
    [
        (lambda client: client.complete(""), "invalid_request", "body.prompt"),
        (lambda client: client.complete("abc", top_p=2.0), "invalid_request", "body.top_p"),
        (lambda client: client.complete("abc", model="other"), "model_not_found", "body.model"),
        (lambda client: client.complete("a" * 256), "context_length_exceeded", "body.prompt"),
        (lambda client: client.complete([300]), "invalid_request", "body.prompt"),
        (lambda client: client.chat([]), "invalid_request", "body.messages"),
        (lambda client: client.chat(HELLO, priority=2**40), "invalid_request", "priority"),
        (lambda client: client.samples(17, HELLO)[16], None, None),
    ],
)
async def test_errors_name_the_field_and_leave_other_streams_alone(ask: Callable[..., Any], code: str | None, param: str | None):
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 1
        other = client.complete("abc", max_tokens=5)
        await eventually(lambda: live(served) == 1)
        if code is None:
            with pytest.raises(InvalidRequestError):
                ask(client)
        else:
            with pytest.raises(RemoteError) as caught:
                await ask(client).result()
            assert (caught.value.remote_code, caught.value.param, caught.value.can_retry) == (code, param, False)
        await served.engine.release()
        assert await other.result() == "abcab"


async def test_a_request_larger_than_a_frame_is_refused_before_it_is_sent():
    async with serving() as served, connect(served.url) as client:
        with pytest.raises(InvalidRequestError, match="bytes"):
            client.complete("x" * (1 << 20))
        assert await client.complete("abc", max_tokens=3).result() == "abc"


async def test_ping_brings_the_servers_clock():
    async with serving() as served, connect(served.url) as client:
        first, second = await asyncio.gather(client.ping(), client.ping())
        assert 0 < first <= second


async def test_a_drain_is_told_and_running_streams_finish():
    async with serving(drain_timeout_s=50.0) as served, connect(served.url) as client:
        served.engine.hold = 1
        stream = client.complete("abc", max_tokens=6)
        await eventually(lambda: stream.num_tokens == 1)
        draining = asyncio.create_task(served.server.drain("maintenance"))
        await eventually(lambda: client.draining is not None)
        with pytest.raises(RemoteError) as caught:
            await client.complete("abc").result()
        assert (caught.value.remote_code, caught.value.can_retry) == ("draining", True)
        await served.engine.release()
        assert await stream.result() == "abcabc"
        assert await draining is True
        await eventually(lambda: client._lost is not None)
        assert "1001" in str(client._lost)


# -- no server, or none that speaks the protocol ----------------------------------------------------------------------


async def test_a_lost_connection_ends_everything_that_waits_and_everything_that_comes():
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 2
        stream = client.complete("abc", max_tokens=100)
        await eventually(lambda: stream.num_tokens == 2)
        (connection,) = served.server.stream_door.connections
        connection.abort("test")
        with pytest.raises(ClientConnectionError):
            await stream.result()
        assert stream.text == "ab"
        for wait in (client.complete("abc").result, client.chat(HELLO).result, client.ping):
            with pytest.raises(ClientConnectionError):
                await wait()
        await stream.cancel()


async def test_a_ping_on_its_way_ends_with_the_connection():
    async with serving() as served, connect(served.url) as client:
        (connection,) = served.server.stream_door.connections
        ping = asyncio.create_task(client.ping())
        connection.abort("test")
        with pytest.raises(ClientConnectionError):
            await ping


@asynccontextmanager
async def other_server(answer: Callable[[web.WebSocketResponse], Any]) -> AsyncIterator[str]:
    """A WebSocket server that does what it likes after `hello`."""

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=["streamkv.v1.json"])
        await socket.prepare(request)
        await socket.receive()
        await answer(socket)
        await socket.receive()
        return socket

    app = web.Application()
    app.router.add_get("/v1/stream", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"ws://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1/stream"
    finally:
        await runner.cleanup()


async def _silence(_socket: web.WebSocketResponse) -> None: ...


async def refusal(url: str, timeout: float = DEADLINE_S) -> str:
    with pytest.raises(ClientConnectionError) as caught:
        async with connect(url, timeout=timeout):
            raise AssertionError("connected")
    return caught.value.message


async def test_nobody_listens():
    async with other_server(_silence) as url:
        pass
    assert "start one with `streamkv serve`" in await refusal(url)


async def test_another_path():
    async with serving() as served:
        assert "404" in await refusal(served.base.replace("http", "ws") + "/other")


async def test_a_server_that_refuses():
    async with serving(max_connections=1) as served, connect(served.url):
        assert "503" in await refusal(served.url)


async def test_a_server_that_does_not_answer():
    async with other_server(_silence) as url:
        assert "did not answer within 0.05 s" in await refusal(url, timeout=0.05)


@pytest.mark.parametrize("text", ["hello", "{}", '{"t":"pong","ts":1,"now":1}', '{"t":"welcome"}', "\x00"])
async def test_a_server_that_speaks_something_else(text: str):
    async with other_server(lambda socket: socket.send_str(text)) as url:
        assert "the server" in await refusal(url)


async def test_a_server_that_closes():
    async with other_server(lambda socket: socket.close(code=4400)) as url:
        assert "4400" in await refusal(url)


async def test_a_server_that_goes_mad_later():
    async def mad(socket: web.WebSocketResponse) -> None:
        limits = {"streams": 1, "queue": 1, "window": 8, "frame": 1000, "hello_s": 1, "ring": 8}
        welcome = {
            "t": "welcome",
            "session": "s",
            "epoch": "e",
            "server": "x",
            "models": [],
            "limits": limits,
            "heartbeat_s": 1,
            "grace_s": 1,
            "resume_s": 1,
        }
        await socket.send_json(welcome)
        await socket.receive()
        await socket.send_str("not a message")

    async with other_server(mad) as url, connect(url) as client:
        with pytest.raises(ClientConnectionError, match="no message"):
            await client.complete("abc").result()

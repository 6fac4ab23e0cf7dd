"""100,000 mutated frames, and frames that break RFC 6455: no traceback for a client, no hang, and the server goes on.

python -m benchmarks.fuzz [--frames 100000] [--seed 1] [--quick]

Valid messages of the protocol are cut, doubled, spliced and filled with extreme numbers, in JSON and in MessagePack. After
every 32 of them the client asks for a sign of life: a `pong` or a close code of docs/protocol.md must come, and quickly.
Meanwhile another client reads a stream, whose text must be right.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import struct
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, Final

import aiohttp
import msgspec
import structlog
import uvloop

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.timed import VOCAB, served, word_of
from streamkv.client import connect
from streamkv.engine.api import EngineRequest
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.protocol import messages as m
from streamkv.protocol.limits import SessionLimits
from streamkv.sampling_params import Sampling
from streamkv.server.config import ServerConfig

BATCH: Final = 32
CLOSE_CODES: Final = frozenset({1000, 1001, 1002, 1003, 1006, 1007, 1008, 1009, 4400, 4408, 4409})
"""1006 is what a client sees that still sends when the server has closed: TCP resets the connection and the code is lost."""
LEAKS: Final = (b"Traceback", b'File "', b"Error(", b"/streamkv/", b"msgspec")

_BODY: Final[dict[str, Any]] = {
    "prompt": [300, 301, 5],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["x"],
}
VALID: Final[list[dict[str, Any]]] = [
    {"t": "hello", "client": "fuzz", "session": "abc", "epoch": "fake"},
    {"t": "create", "id": "a", "api": "completions", "body": _BODY, "max": 2, "priority": 1},
    {"t": "create", "ids": ["b", "c"], "api": "completions", "body": {"prompt": "Hi", "n": 2, "logit_bias": {"5": 1.5}}},
    {"t": "create", "id": "d", "api": "chat", "body": {"messages": [{"role": "user", "content": "Hi"}], "tools": []}},
    {"t": "create", "ids": ["e"], "api": "embeddings", "body": {"input": ["Hi"], "pooling": "mean"}},
    {"t": "create", "id": "f", "api": "score", "body": {"prompt": "One", "input": " two", "logprobs": 2}},
    {"t": "credit", "id": "a", "max": 17, "ack": 3},
    {"t": "cancel", "id": "a"},
    {"t": "resume", "id": "a", "from": 1, "epoch": "fake", "max": 9},
    {"t": "fork", "from": "a", "ids": ["g"], "at": 1, "body": {"max_tokens": 2}},
    {"t": "ping", "ts": 1.5},
]
_EXTREMES: Final[list[Any]] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**53,
    2**63,
    2**64 - 1,
    -0.0,
    1e308,
    "",
    "\x00",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
]


def main() -> None:
    parser = argparse.ArgumentParser(description="mutated frames")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2,000 frames: shows that it runs")
    arguments = parser.parse_args()
    frames = 2000 if arguments.quick else arguments.frames
    print_setting("streamkv", "aiohttp", "uvloop", "msgspec")
    uvloop.run(_measure(frames, arguments.seed))


async def _measure(frames: int, seed: int) -> None:
    log = _Log()
    structlog.configure(processors=[log])
    engine = FakeEngine(word_of, info=fake_info(vocab_size=VOCAB, max_model_len=1 << 20, embedding_dim=3), interval_s=0.001)
    engine.start()
    config = ServerConfig(port=0, limits=SessionLimits(grace_s=0.0, resume_s=0.0), drain_timeout_s=0.0, slo_ttft_s=1e6)
    async with served(engine, config) as server, AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(connect(f"ws://127.0.0.1:{server.port}/v1/stream"))
        stream = bystander.complete([300], max_tokens=1_000_000, temperature=0)
        reading = asyncio.create_task(stream.result())
        http = await stack.enter_async_context(aiohttp.ClientSession())
        rows = []
        for codec in m.CODECS.values():
            fuzz = _Fuzz(http, server.port, codec, random.Random(f"{seed} {codec.subprotocol}"))
            await fuzz.run(frames // 2)
            rows.append(fuzz.row())
        raw = {name: await _raw(server.port, data) for name, (data, _) in RAW.items()}
        await stream.cancel()
        text = await asyncio.wait_for(reading, 30)
        request = EngineRequest(("x",), [300], Sampling(max_tokens=1))
        expected = "".join(f" w{word_of(request, 0, position) - 256}" for position in range(stream.num_tokens))
        assert text.lstrip() == expected.lstrip(), "the bystander's text is wrong"
    await engine.close()
    header = ["", "frames", "connections", "answers", "closed by", "leaks", "p99 ms to a sign of life", "max ms"]
    print_table("Mutated frames", header, rows)
    differ = {name: got for name, got in raw.items() if got not in RAW[name][1]}
    wrong = {name: got for name, got in differ.items() if got not in UPSTREAM.get(name, ())}
    row = ["raw frames", len(RAW), len(RAW) - len(differ), len(differ) - len(wrong), len(wrong)]
    print_table("Frames that break RFC 6455", ["", "cases", "as the RFC wants", "aiohttp's own way", "wrong"], [row])
    print(f"aborted by the server: {dict(log.aborts) or 'none'}; ", end="")
    print(f"the bystander has read {stream.num_tokens:,} tokens, all right; the server has logged {log.errors} failures")
    if wrong or log.errors or any(row[5] for row in rows):
        raise SystemExit(f"wrong: {wrong}, logged: {log.first}")


class _Log:
    """Drops everything and counts failures."""

    def __init__(self) -> None:
        self.errors = 0
        self.first: Any = None
        self.aborts: Counter[str] = Counter()

    def __call__(self, _logger: Any, level: str, event: Any) -> Any:
        if level in ("error", "exception", "critical") or event.get("exc_info"):
            self.errors += 1
            self.first = self.first or event
        if event.get("event") == "aborted":
            self.aborts[event["reason"]] += 1
        raise structlog.DropEvent


class _Fuzz:
    """One client that never learns."""

    def __init__(self, http: aiohttp.ClientSession, port: int, codec: m.Codec, source: random.Random) -> None:
        self._http, self._port, self._codec, self._source = http, port, codec, source
        self._kind = aiohttp.WSMsgType.TEXT if codec.text else aiohttp.WSMsgType.BINARY
        self._seeds = [codec.encode(message) for message in VALID]
        self.frames = self.connections = self.leaks = 0
        self.answers: Counter[str] = Counter()
        self.codes: Counter[int | None] = Counter()
        self.waits: list[float] = []

    def row(self) -> list[object]:
        """Cells of the table."""
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items(), key=str))
        waits = [f"{percentile(self.waits, share) * 1000:.1f}" for share in (0.99, 1.0)]
        return [
            self._codec.subprotocol,
            f"{self.frames:,}",
            self.connections,
            f"{self.answers.total():,}",
            codes,
            self.leaks,
            *waits,
        ]

    async def run(self, frames: int) -> None:
        """So many frames, over as many connections as that takes."""
        while self.frames < frames:
            socket = await self._http.ws_connect(
                f"ws://127.0.0.1:{self._port}/v1/stream", protocols=(self._codec.subprotocol,), compress=0, max_msg_size=1 << 26
            )
            self.connections += 1
            greeted = self._source.random() < 0.9
            if greeted:
                await socket.send_frame(self._codec.encode(m.Hello()), self._kind)
            while self.frames < frames and await self._batch(socket):
                pass
            await socket.close()

    async def _batch(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        """True if the connection lives."""
        began = time.perf_counter()
        try:
            for _ in range(BATCH):
                self.frames += 1
                await socket.send_frame(self._mutant(), self._kind)
            await socket.send_frame(self._codec.encode(m.Ping(-77.25)), self._kind)
        except ConnectionError:
            pass  # closed already: what it said is read below
        async with asyncio.timeout(10):
            alive = await self._sign_of_life(socket)
        self.waits.append(time.perf_counter() - began)
        return alive

    async def _sign_of_life(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        while True:
            frame = await socket.receive()
            if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                code = frame.data if frame.type is aiohttp.WSMsgType.CLOSE else socket.close_code
                self.codes[code] += 1
                assert code in CLOSE_CODES, f"closed with {code}"
                return False
            data = frame.data.encode() if isinstance(frame.data, str) else frame.data
            self.leaks += any(leak in data for leak in LEAKS)
            message = self._codec.decode_server(data)
            if isinstance(message, m.Pong) and message.ts == -77.25:
                return True
            self.answers[type(message).__name__] += 1

    def _mutant(self) -> bytes:
        source = self._source
        if source.random() < 0.4:
            return self._codec.encode(self._changed(source.choice(VALID)))
        data = bytearray(source.choice(self._seeds))
        for _ in range(source.randint(1, 4)):
            at, to = sorted((source.randrange(len(data) + 1), source.randrange(len(data) + 1)))
            other = source.choice(self._seeds)
            match source.randrange(6):
                case 0 if at < len(data):
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    del data[at:to]
                case 2:
                    data[at:at] = data[at:to] * source.randint(1, 3)
                case 3:
                    data[at:to] = other[source.randrange(len(other)) :]
                case 4:
                    data[at:at] = source.randbytes(source.randint(1, 8))
                case _:
                    data[at:at] = source.choice(
                        [b"9" * 400, b"[" * 300, b"\xff", b"null", b"\x00", b"\\ud800", b"\xdf\xff\xff\xff\xff"]
                    )
        if self._codec.text and source.random() < 0.99:
            # What is no UTF-8 ends the connection, and what comes behind it would try nothing.
            return data.decode("utf-8", "replace").encode()
        return bytes(data)

    def _changed(self, value: Any) -> Any:
        """A message with one value replaced, left out or doubled."""
        if not isinstance(value, dict) or self._source.random() < 0.3:
            return self._source.choice(_EXTREMES)
        changed = dict(value)
        key = self._source.choice(list(changed) or ["t"])
        match self._source.randrange(4):
            case 0:
                changed.pop(key, None)
            case 1:
                changed[f"{key}2"] = self._source.choice(_EXTREMES)
            case _:
                changed[key] = self._changed(changed.get(key))
        return changed


# -- below messages ---------------------------------------------------------------------------------------------------


def _frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True, length: int | None = None
) -> bytes:
    """One client frame, right or wrong; `length`: what its header says."""
    size = len(payload) if length is None else length
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", first, bit | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if not mask:
        return head + payload
    key = b"\x11\x22\x33\x44"
    return head + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def _close(code: int, reason: bytes = b"") -> bytes:
    return _frame(8, struct.pack("!H", code) + reason)


_PING: Final = b'{"t":"ping","ts":1}'
_ALIVE: Final = ("pong",)
_ERROR: Final = (1002,)
_UTF8: Final = (1007,)

RAW: Final[dict[str, tuple[bytes, tuple[Any, ...]]]] = {
    "text in one frame": (_frame(1, _PING), _ALIVE),
    "text in three frames": (_frame(1, _PING[:5], fin=False) + _frame(0, _PING[5:9], fin=False) + _frame(0, _PING[9:]), _ALIVE),
    "text in frames of one byte": (
        _frame(1, _PING[:1], fin=False) + b"".join(_frame(0, bytes([byte]), fin=False) for byte in _PING[1:]) + _frame(0),
        _ALIVE,
    ),
    "ping between fragments": (_frame(1, _PING[:5], fin=False) + _frame(9, b"x") + _frame(0, _PING[5:]), _ALIVE),
    "pong that nobody asked for": (_frame(10, b"x") + _frame(1, _PING), _ALIVE),
    "ping of 125 bytes": (_frame(9, b"x" * 125) + _frame(1, _PING), _ALIVE),
    "10 pings": (_frame(9, b"x") * 10 + _frame(1, _PING), _ALIVE),
    "ping of 126 bytes": (_frame(9, b"x" * 126), _ERROR),
    "fragmented ping": (_frame(9, b"x", fin=False), _ERROR),
    "fragmented close": (_frame(8, b"\x03\xe8", fin=False), _ERROR),
    **{f"RSV {rsv}": (_frame(1, _PING, rsv=rsv), _ERROR) for rsv in range(1, 8)},
    **{f"opcode {opcode}": (_frame(opcode, b"x"), _ERROR) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "continuation of nothing": (_frame(0, b"x"), _ERROR),
    "text inside a fragmented text": (_frame(1, b"a", fin=False) + _frame(1, b"b"), _ERROR),
    "not masked": (_frame(1, _PING, mask=False), _ERROR),
    "empty text": (_frame(1, b"") + _frame(1, _PING), _ALIVE),
    "text that is no UTF-8": (_frame(1, b'{"t":"ping","ts":1,"x":"\xff"}') + _frame(1, _PING), _UTF8),
    "surrogate in text": (_frame(1, b'{"t":"ping","ts":1,"x":"\xed\xa0\x80"}') + _frame(1, _PING), _UTF8),
    "close": (_close(1000), (1000,)),
    "close with a reason": (_close(1000, b"bye"), (1000,)),
    "close without a code": (_frame(8), (1000, 1005, "empty")),
    "close of one byte": (_frame(8, b"\x03"), _ERROR),
    "close with a reason that is no UTF-8": (_close(1000, b"\xff\xfe"), (1002, 1007)),
    "close of 126 bytes": (_close(1000, b"x" * 124), _ERROR),
    **{f"close {code}": (_close(code), _ERROR) for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999)},
    **{
        f"close {code}": (_close(code), (code, 1000))
        for code in (1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
    },
    "longer than allowed": (_frame(1, b"x" * 100, length=1 << 40), (1009,)),
    "longest length with its top bit": (_frame(1, b"x" * 100, length=(1 << 63) + 5), (1002, 1009)),
    "1 MiB and a byte": (_frame(1, b" " * ((1 << 20) + 1)), (1009,)),
    "binary on JSON": (_frame(2, _PING), (1003,)),
    "text after close": (_close(1000) + _frame(1, _PING), (1000,)),
}
"""Bytes after hello -> what may come of them: a close code, or "pong"."""

UPSTREAM: Final[dict[str, tuple[Any, ...]]] = {"not masked": ("pong",), "close 1006": (1000,)}
"""Where aiohttp 3.14 is more patient than the RFC, and what it does; harmless, and not in this server's hands."""


async def _raw(port: int, data: bytes) -> int | str:
    """What the server does with these bytes; "hang" if nothing within 5 s."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        "GET /v1/stream HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Protocol: streamkv.v1.json",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_frame(1, b'{"t":"hello"}') + data)
        async with asyncio.timeout(5):
            return await _answer(reader)
    except TimeoutError:
        return "hang"
    except (asyncio.IncompleteReadError, ConnectionError):
        return "dropped"
    finally:
        writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> int | str:
    while True:
        first, size = await reader.readexactly(2)
        if size >= 126:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        payload = await reader.readexactly(size)
        if first & 15 == 8:
            return int.from_bytes(payload[:2], "big") if payload else "empty"
        if first & 15 == 1 and msgspec.json.decode(payload)["t"] == "pong":
            return "pong"


if __name__ == "__main__":
    main()

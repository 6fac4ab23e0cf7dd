"""100,000 mutated frames, and frames that break RFC 6455: no traceback for a client, no hang, and the server goes on.

python -m benchmarks.fuzz [--frames 100000] [--seed 1] [--quick]

Valid messages of the protocol are cut, doubled, spliced and filled with extreme numbers, in JSON and in MessagePack. After
every 32 of them the client asks for a sign of life: a `pong` or a close code of docs/protocol.md must come, and quickly.
Meanwhile another client reads a stream, whose text must be right.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, Final

import aiohttp
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
from tests.server.websocket_cases import CASES, talk

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
        heard = {name: (await talk(server.port, case)).last for name, case in CASES.items()}
        await stream.cancel()
        text = await asyncio.wait_for(reading, 30)
        request = EngineRequest(("x",), [300], Sampling(max_tokens=1))
        expected = "".join(f" w{word_of(request, 0, position) - 256}" for position in range(stream.num_tokens))
        assert text.lstrip() == expected.lstrip(), "the bystander's text is wrong"
    await engine.close()
    header = ["", "frames", "connections", "answers", "closed by", "leaks", "p99 ms to a sign of life", "max ms"]
    print_table("Mutated frames", header, rows)
    differ = {name: last for name, last in heard.items() if last not in CASES[name].wanted}
    wrong = {name: last for name, last in differ.items() if last != CASES[name].known}
    row = ["raw frames", len(CASES), len(CASES) - len(differ), len(differ) - len(wrong), len(wrong)]
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


if __name__ == "__main__":
    main()

"""The OpenAI door without a model: CPU of an SSE chunk beside that of a WebSocket frame, and small requests per second.

python -m benchmarks.openai_door [--streams 64] [--rate 100] [--tokens 500] [--requests 4000] [--rounds 3] [--quick]

A real server over a fake engine in one process, a client in another. CPU is the server process's; "the engine and the hub
alone" is the same work with nobody connected, and is what is subtracted. Both doors send every token by itself: the
WebSocket's merging is off. Rounds are interleaved and the median is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

import aiohttp
import msgspec
import uvloop

from benchmarks.report import print_setting, print_table
from benchmarks.server import LOOPS, VOCAB, child
from benchmarks.workloads import make_tokenizer
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.logs import configure_logs
from streamkv.protocol import messages as m
from streamkv.protocol.limits import SessionLimits
from streamkv.sampling_params import SamplingParams
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.events import Finished, StreamEvent
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer

CODEC: Final = m.CODECS["streamkv.v1.json"]
PROMPT: Final = [300, 301, 302]
AT_ONCE: Final = 16


@dataclass(frozen=True)
class Load:
    """What the client is to do.

    Attributes:
        kind: `sse`, `ws`; `requests` and `ws requests` are answers of one token.
        streams: one connection each; of `requests`, how many there are altogether.
    """

    kind: str
    streams: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the OpenAI door with a fake engine")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=100.0, help="tokens per second of each stream (%(default)s)")
    parser.add_argument("--tokens", type=int, default=500, help="of each stream (%(default)s)")
    parser.add_argument("--requests", type=int, default=4000, help="of one token each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", choices=LOOPS, default="uvloop", help="of the server (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not how fast")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.requests, arguments.rounds = 4, 20, 50, 1
    print_setting("streamkv", "aiohttp", "uvloop", "msgspec")
    configure_logs(level="error")
    streaming = [Load(kind, arguments.streams, arguments.tokens) for kind in ("hub", "sse", "ws")]
    small = [Load(kind, arguments.requests, 1) for kind in ("requests", "ws requests")]
    found: dict[str, list[tuple[float, float, int]]] = {}
    with asyncio.Runner(loop_factory=LOOPS[arguments.loop]) as runner:
        for _ in range(arguments.rounds):
            for load in (*streaming, *small):
                interval_s = 1 / arguments.rate if load in streaming else 0.0
                found.setdefault(load.kind, []).append(runner.run(_measure(load, interval_s)))
    _print_chunks(found, arguments)
    _print_requests(found, arguments.requests)


def _print_chunks(found: dict[str, list[tuple[float, float, int]]], arguments: argparse.Namespace) -> None:
    tokens = arguments.streams * arguments.tokens
    alone = statistics.median(cpu for cpu, _, _ in found["hub"])
    rows = [["the engine and the hub alone", f"{alone / tokens * 1e6:.1f}", "", "", ""]]
    for kind, name in (("sse", "SSE chunk, /v1/completions"), ("ws", "WebSocket frame, /v1/stream")):
        cpus, pieces = [cpu for cpu, _, _ in found[kind]], found[kind][0][2]
        own = [(cpu - alone) / pieces * 1e6 for cpu in cpus]
        cpu = statistics.median(cpus)
        rows.append(
            [name, f"{cpu / tokens * 1e6:.1f}", f"{statistics.median(own):.1f}", f"{min(own):.1f}-{max(own):.1f}", f"{pieces:,}"]
        )
    title = f"{arguments.streams} connections x {arguments.tokens} tokens at {arguments.rate:g} tok/s, server on {arguments.loop}"
    print_table(title, ["", "CPU µs a token", "of it the door's own µs a piece", "range of rounds", "pieces"], rows)


def _print_requests(found: dict[str, list[tuple[float, float, int]]], requests: int) -> None:
    rows = []
    for kind, name in (("requests", "POST /v1/completions, not streamed"), ("ws requests", "create to done, /v1/stream")):
        cpu, wall, _ = (statistics.median(column) for column in zip(*found[kind], strict=True))
        rows.append([name, f"{requests / wall:.0f}", f"{requests / cpu:.0f}", f"{cpu / requests * 1e6:.0f}"])
    header = ["max_tokens 1", "requests/s", "requests per second of one core's CPU", "CPU µs a request"]
    print_table(f"{requests} requests, {AT_ONCE} at once on {AT_ONCE} connections", header, rows)


# -- server process ---------------------------------------------------------------------------------------------------


async def _measure(load: Load, interval_s: float) -> tuple[float, float, int]:
    """(CPU seconds of this process, seconds, pieces that the client has counted)."""
    engine = FakeEngine(info=fake_info(vocab_size=VOCAB, max_model_len=100_000), interval_s=interval_s, max_live=100_000)
    engine.start()
    limits = SessionLimits(flush_tokens=1)
    # All streams come at once to a server that has measured nothing yet: admission is not what is measured here.
    async with TextStreams(engine, TextTokenizer(make_tokenizer(VOCAB))) as streams:
        server = Server(streams, ServerConfig(port=0, limits=limits, drain_timeout_s=0.0, slo_ttft_s=1e6))
        async with server.listening():
            measured = await (_alone(streams, load) if load.kind == "hub" else _served(server.port, load))
    await engine.close()
    return measured


async def _alone(streams: TextStreams, load: Load) -> tuple[float, float, int]:
    left, done = load.streams, asyncio.Event()

    def sink(events: list[StreamEvent]) -> None:
        nonlocal left
        left -= sum(isinstance(event, Finished) for event in events)
        if not left:
            done.set()

    cpu, wall = time.process_time(), time.monotonic()
    for index in range(load.streams):
        prepared = await streams.prepare(PROMPT, SamplingParams(max_tokens=load.tokens), is_chat=False)
        await streams.open([f"h{index}"], prepared, sink=partial(sink))  # a sink of its own for each, as a connection has
    await done.wait()
    return time.process_time() - cpu, time.monotonic() - wall, load.streams * load.tokens


async def _served(port: int, load: Load) -> tuple[float, float, int]:
    with child(_client, load, port) as (_, client):
        await asyncio.to_thread(client.recv)
        cpu, wall = time.process_time(), time.monotonic()
        client.send("go")
        pieces: int = await asyncio.to_thread(client.recv)
        return time.process_time() - cpu, time.monotonic() - wall, pieces


# -- client process ---------------------------------------------------------------------------------------------------


def _client(parent: Connection, load: Load, port: int) -> None:
    uvloop.run(_drive(parent, load, port))


async def _drive(parent: Connection, load: Load, port: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": load.tokens, "stream": load.kind == "sse"}
    places = load.streams if load.kind in ("sse", "ws") else AT_ONCE
    turns = load.streams // places
    drive = _over_websocket if load.kind.startswith("ws") else _over_http
    workers = [drive(port, body, turns) for _ in range(places)]
    ready = asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        opened = [asyncio.create_task(worker(http, ready)) for worker in workers]
        parent.send("ready")
        await asyncio.to_thread(parent.recv)
        ready.set()
        parent.send(sum(await asyncio.gather(*opened)))


_Worker = Callable[[aiohttp.ClientSession, asyncio.Event], Awaitable[int]]


def _over_http(port: int, body: dict[str, Any], turns: int) -> _Worker:
    async def work(http: aiohttp.ClientSession, ready: asyncio.Event) -> int:
        data, headers, pieces = json.dumps(body).encode(), {"Content-Type": "application/json"}, 0
        await ready.wait()
        for _ in range(turns):
            async with http.post(f"http://127.0.0.1:{port}/v1/completions", data=data, headers=headers) as response:
                assert response.status == 200, await response.text()
                async for part in response.content.iter_any():
                    pieces += part.count(b"data: {")
        return pieces

    return work


def _over_websocket(port: int, body: dict[str, Any], turns: int) -> _Worker:
    async def work(http: aiohttp.ClientSession, ready: asyncio.Event) -> int:
        socket = await http.ws_connect(f"ws://127.0.0.1:{port}/v1/stream", protocols=(CODEC.subprotocol,), compress=0)
        await socket.send_str(CODEC.encode(m.Hello()).decode())
        await socket.receive()
        await ready.wait()
        pieces = 0
        for turn in range(turns):
            create = m.Create("completions", msgspec.Raw(CODEC.encode(body)), id=f"s{turn}")
            await socket.send_str(CODEC.encode(create).decode())
            while '"t":"done"' not in (text := (await socket.receive()).data)[:64]:
                assert '"t":"error"' not in text, text
                pieces += '"t":"delta"' in text[:64]
        await socket.close()
        return pieces

    return work


if __name__ == "__main__":
    main()

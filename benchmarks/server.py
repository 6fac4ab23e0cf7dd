"""The server without a model: latency from the engine's queue to the client, CPU, lag of the event loop.

python -m benchmarks.server [--streams 500] [--rate 20] [--seconds 10] [--connections 10] [--idle 0] [--rounds 1] [--quick]

A real server over a fake engine in one process, a client in another, real sockets between them. The engine steps all streams
together, so every step is a burst of one token per stream. A token's time starts when its step is put into the engine's
queue and ends when the client's socket has its frame; both processes read CLOCK_MONOTONIC, which Linux shares between them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any, Final

import aiohttp
import msgspec
import psutil
import uvloop

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.workloads import make_tokenizer
from streamkv.engine.api import StepBatch
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.engine.thread import make_full_collections_rare
from streamkv.logs import configure_logs
from streamkv.observe.lag import LoopLag
from streamkv.protocol import messages as m
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer

VOCAB: Final = 1024
WARM_UP_S: Final = 2.0
MIB: Final = 1 << 20
CREDIT: Final = 10
LOOPS: Final = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
SPAWN: Final = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setting:
    """What both processes have to know."""

    streams: int
    rate: float
    seconds: float
    connections: int
    codec: str
    loop: str
    flush_s: float
    stalled: int = 0
    """Streams of each connection that accept `CREDIT` tokens and no more."""
    idle: int = 0
    """Further connections, of one more process, on which nothing happens but heartbeats."""

    @property
    def max_tokens(self) -> int:
        """Tokens of each stream: warm-up, what is measured, and one second more, so that all streams run to the end."""
        return int(self.rate * (WARM_UP_S + self.seconds + 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the server with a fake engine")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help=f"measured, after {WARM_UP_S:g} s of warm-up (%(default)s)")
    parser.add_argument("--connections", type=int, default=10, help="that share the streams (%(default)s)")
    parser.add_argument("--idle", type=int, default=0, help="further connections without streams (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of each row; shown is the median (%(default)s)")
    parser.add_argument("--codec", choices=["json", "msgpack"], default="json")
    parser.add_argument("--loop", choices=LOOPS, default="uvloop", help="of the server (%(default)s)")
    parser.add_argument("--flush-ms", type=float, nargs="+", default=[SessionLimits().flush_s * 1000, 0.0])
    parser.add_argument("--quick", action="store_true", help="20 streams, 1 second: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.seconds, arguments.connections = 20, 1.0, 2
        arguments.idle = min(arguments.idle, 50)
    print_setting("streamkv", "aiohttp", "uvloop", "msgspec")
    print(f"server on {arguments.loop}, client on uvloop, {arguments.codec} frames\n", flush=True)
    found = [
        [latency(setting_of(arguments, flush_ms / 1000)) for flush_ms in arguments.flush_ms] for _ in range(arguments.rounds)
    ]
    rows = [
        [f"{flush_ms:g} ms", *median(rounds)]
        for flush_ms, rounds in zip(arguments.flush_ms, zip(*found, strict=True), strict=True)
    ]
    title = (
        f"{arguments.streams} streams x {arguments.rate:g} tok/s on {arguments.connections} connections, {arguments.seconds:g} s"
        f", {arguments.idle:,} idle connections beside them"
    )
    header = ["a token waits for others at most", "p50 ms", "p90 ms", "p99 ms", "max ms", "tok/s", "tokens a frame"]
    print_table(title, [*header, "loop lag p99 ms", "server CPU %", "client CPU %", "server MiB"], rows)


def setting_of(arguments: argparse.Namespace, flush_s: float) -> Setting:
    names = ("streams", "rate", "seconds", "connections", "codec", "loop", "idle")
    return Setting(**{name: getattr(arguments, name) for name in names}, flush_s=flush_s)


# -- parent -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What one run gave: milliseconds, rates, percent of one core."""

    p50: float
    p90: float
    p99: float
    max: float
    rate: float
    tokens_a_frame: float
    lag: float
    server_cpu: float
    client_cpu: float
    resident: float
    """MiB of the server's process."""
    stalled: list[int]
    """Tokens that each stalled stream has had."""


def median(rounds: Sequence[Figures]) -> list[str]:
    """Cells, each the median of its own."""
    digits = {"rate": 0, "tokens_a_frame": 2, "server_cpu": 0, "client_cpu": 0, "resident": 0}
    names = [item.name for item in fields(Figures) if item.name != "stalled"]
    return [f"{statistics.median(getattr(found, name) for found in rounds):.{digits.get(name, 1)}f}" for name in names]


def latency(setting: Setting) -> Figures:
    """One run."""
    with child(serve, setting) as (server, to_server):
        port: int = to_server.recv()
        with _idle_beside(port, setting.idle), child(_client, setting, port) as (client, to_client):
            assert to_client.recv() == "running"
            time.sleep(WARM_UP_S)  # the figure is a rate over a time, not a state that could be waited for
            to_server.send("measure")
            shares = _cpu_shares((server, client), setting.seconds)
            resident = server.memory_info().rss / MIB
            received: dict[str, list[tuple[float, int, int]]] = to_client.recv()
        to_server.send("stop")
        queued: dict[str, list[float]]
        lag: float
        queued, lag = to_server.recv()
    start = min(times[0] for times in queued.values()) + WARM_UP_S
    latencies, frames, stalled = [], 0, []
    for stream, deltas in received.items():
        if len(queued[stream]) < setting.max_tokens:
            stalled.append(sum(count for _, _, count in deltas))
            continue
        for at, offset, count in deltas:
            if start <= queued[stream][offset] < start + setting.seconds:
                latencies += [(at - queued_at) * 1000 for queued_at in queued[stream][offset : offset + count]]
                frames += 1
    points = [percentile(latencies, share) for share in (0.5, 0.9, 0.99, 1.0)]
    return Figures(*points, len(latencies) / setting.seconds, len(latencies) / frames, lag * 1000, *shares, resident, stalled)


@contextmanager
def _idle_beside(port: int, count: int) -> Iterator[None]:
    """So many connections are there inside the block."""
    with child(idle_client, port, count) if count else nullcontext((None, None)) as (_, to_client):
        if to_client is not None:
            to_client.send("connect")
            assert to_client.recv() == "connected"
        yield
        if to_client is not None:
            to_client.send("leave")
            assert to_client.recv() == "left"


def _cpu_shares(processes: tuple[psutil.Process, ...], seconds: float) -> list[float]:
    """Percent of one core that each process uses during the next `seconds`."""
    before = [sum(process.cpu_times()[:2]) for process in processes]
    started = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    return [100 * (sum(process.cpu_times()[:2]) - used) / elapsed for process, used in zip(processes, before, strict=True)]


@contextmanager
def child(target: Any, *arguments: Any) -> Iterator[tuple[psutil.Process, Connection]]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield psutil.Process(process.pid), ours
        process.join(30)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


# -- server process ---------------------------------------------------------------------------------------------------


class RecordingEngine(FakeEngine):
    """Remembers when each token of each request was queued."""

    def __init__(self, interval_s: float) -> None:
        super().__init__(info=fake_info(vocab_size=VOCAB, max_model_len=100_000), interval_s=interval_s, max_live=100_000)
        self.queued: dict[str, list[float]] = {}

    async def steps(self) -> AsyncIterator[StepBatch]:
        """As they come, noted on the way."""
        async for batch in super().steps():
            for output in batch.outputs:
                if output.token_ids:
                    self.queued.setdefault(output.id, []).extend([batch.at] * len(output.token_ids))
            yield batch


def serve(parent: Connection, setting: Setting) -> None:
    more_files()
    configure_logs(level="warning")
    make_full_collections_rare()
    with asyncio.Runner(loop_factory=LOOPS[setting.loop]) as runner:
        runner.run(_serve(parent, setting))


async def _serve(parent: Connection, setting: Setting) -> None:
    """Listen until the parent says stop; then tell it when every token was queued, and how late the loop was since "measure"."""
    engine = RecordingEngine(1.0 / setting.rate)
    engine.start()
    tokenizer = TextTokenizer(make_tokenizer(VOCAB))
    limits = SessionLimits(streams=max(64, setting.streams), flush_s=setting.flush_s)
    config = ServerConfig(port=0, max_connections=100_000, limits=limits, drain_timeout_s=0.0)
    async with TextStreams(engine, tokenizer) as streams:
        server = Server(streams, config)
        async with server.listening():
            lag = LoopLag()
            lag.start()
            mark = lag.mark()
            parent.send(server.port)
            while await asyncio.to_thread(parent.recv) != "stop":  # else it is "measure"
                mark = lag.mark()
            late = lag.since(mark)
            lag.stop()
    await engine.close()
    parent.send((engine.queued, late))


# -- client processes -------------------------------------------------------------------------------------------------


def _client(parent: Connection, setting: Setting, port: int) -> None:
    uvloop.run(_read_all(parent, setting, port))


async def _read_all(parent: Connection, setting: Setting, port: int) -> None:
    """Open all streams, read until all are done; frames are only stamped while they come and decoded afterwards."""
    codec = m.CODECS[f"streamkv.v1.{setting.codec}"]
    shares = [len(range(index, setting.streams, setting.connections)) for index in range(setting.connections)]
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        sockets = [await open_socket(http, port, codec) for _ in shares]
        for socket, count in zip(sockets, shares, strict=True):
            for index in range(count):
                body = {"prompt": [300 + index % 700, 301], "max_tokens": setting.max_tokens, "ignore_eos": True}
                limit = CREDIT if index < setting.stalled else None
                create = m.Create("completions", msgspec.Raw(codec.encode(body)), id=f"s{index}", max=limit)
                await socket.send_frame(codec.encode(create), _kind(codec))
        parent.send("running")
        reads = await asyncio.gather(
            *(_read(socket, codec, count - setting.stalled) for socket, count in zip(sockets, shares, strict=True))
        )
        for socket in sockets:
            await socket.close()
    received: dict[str, list[tuple[float, int, int]]] = {}
    for frames in reads:
        received |= _sorted_out(frames, codec)
    parent.send(received)


def idle_client(parent: Connection, port: int, count: int) -> None:
    """Connects when told so, says hello, stays until told to leave."""
    more_files()
    uvloop.run(_stay(parent, port, count))


async def _stay(parent: Connection, port: int, count: int) -> None:
    await asyncio.to_thread(parent.recv)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        sockets = [await open_socket(http, port, m.CODECS["streamkv.v1.json"]) for _ in range(count)]
        answering = [asyncio.create_task(_answer_heartbeats(socket)) for socket in sockets]
        parent.send("connected")
        await asyncio.to_thread(parent.recv)
        assert not any(task.done() for task in answering), "idle connections were lost"
        await asyncio.gather(*(socket.close() for socket in sockets), *answering)
    parent.send("left")


async def _answer_heartbeats(socket: aiohttp.ClientWebSocketResponse) -> None:
    """As long as somebody reads, aiohttp answers."""
    async for _ in socket:
        raise AssertionError("nothing was to come on an idle connection")


async def open_socket(http: aiohttp.ClientSession, port: int, codec: m.Codec) -> aiohttp.ClientWebSocketResponse:
    url = f"ws://127.0.0.1:{port}/v1/stream"
    socket = await http.ws_connect(url, protocols=(codec.subprotocol,), max_msg_size=1 << 24, compress=0)
    await socket.send_frame(codec.encode(m.Hello()), _kind(codec))
    await socket.receive()
    return socket


def _kind(codec: m.Codec) -> aiohttp.WSMsgType:
    return aiohttp.WSMsgType.TEXT if codec.text else aiohttp.WSMsgType.BINARY


async def _read(socket: aiohttp.ClientWebSocketResponse, codec: m.Codec, streams: int) -> list[tuple[float, Any]]:
    """(arrival, frame) until every stream of the connection has had its last frame."""
    mark = b'"t":"done"' if codec.text else b"\xa1t\xa4done"
    frames: list[tuple[float, Any]] = []
    left = streams
    while left:
        frame = await socket.receive()
        now = time.monotonic()
        if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            raise RuntimeError(f"the server closed the connection: {socket.close_code}")
        data = frame.data.encode() if isinstance(frame.data, str) else frame.data
        frames.append((now, data))
        left -= mark in data[:64]
    return frames


def _sorted_out(frames: list[tuple[float, bytes]], codec: m.Codec) -> dict[str, list[tuple[float, int, int]]]:
    """The engine's name of each stream -> (arrival, offset, tokens) of its deltas."""
    names: dict[str, str] = {}
    deltas: dict[str, list[tuple[float, int, int]]] = {}
    for at, data in frames:
        message = codec.decode_server(data)
        if isinstance(message, m.Accepted):
            names[message.id] = message.rid
        elif isinstance(message, m.Delta):
            deltas.setdefault(message.id, []).append((at, message.o, message.n))
        else:
            assert not isinstance(message, m.Error), f"stream {message.id}: {message.message}"
    return {names[stream_id]: own for stream_id, own in deltas.items()}


def more_files() -> None:
    """As many sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()

"""SIGTERM under load, again and again: every stream that was accepted comes to its end, and the process exits with 0.

python -m benchmarks.drain [--runs 200] [--streams 8] [--tokens 150] [--seed 1] [--quick]

Each run is a server process of its own, over an engine without a model; its streams take 0.3 s. The signal comes at a random
moment of that time. Streams that are asked for after it must be refused, not lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection

import uvloop

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.timed import VOCAB, word_of
from benchmarks.workloads import make_tokenizer
from streamkv.client import ClientConnectionError, RemoteError, connect
from streamkv.client.stream import Stream
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.logs import configure_logs
from streamkv.server.app import Server, run_until_signalled
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer

FORK = multiprocessing.get_context("forkserver")
STEP_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description="SIGTERM under load")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 runs: shows that it runs")
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else arguments.runs
    print_setting("streamkv", "aiohttp", "uvloop")
    FORK.set_forkserver_preload(["benchmarks.timed"])
    source = random.Random(arguments.seed)
    ends: Counter[str] = Counter()
    exits: Counter[int | None] = Counter()
    seconds = []
    for _ in range(runs):
        found, code, took = _run(arguments, source)
        ends.update(found)
        exits[code] += 1
        seconds.append(took)
    header = ["", "runs", "exit 0", "streams finished", "refused after the signal", "lost or wrong", "exit s, p50", "exit s, p99"]
    bad = ends.total() - ends["finished"] - ends["refused"]
    row = ["drains", runs, exits[0], ends["finished"], ends["refused"], bad]
    print_table("SIGTERM under load", header, [[*row, f"{percentile(seconds, 0.5):.2f}", f"{percentile(seconds, 0.99):.2f}"]])
    if bad or exits[0] < runs:
        raise SystemExit(f"exits: {dict(exits)}, ends: {dict(ends)}")


def _run(arguments: argparse.Namespace, source: random.Random) -> tuple[Counter[str], int | None, float]:
    """How its streams ended, the exit status, and the seconds from the signal to the exit."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_server, args=(theirs,))
    process.start()
    theirs.close()
    try:
        port: int = ours.recv()
        ends, signalled = uvloop.run(_talk(port, process.pid or 0, arguments, source.random()))
        process.join(40)
        return ends, process.exitcode, time.monotonic() - signalled
    finally:
        if process.is_alive():
            process.kill()
            process.join()


async def _talk(port: int, pid: int, arguments: argparse.Namespace, when: float) -> tuple[Counter[str], float]:
    ends: Counter[str] = Counter()
    async with connect(f"ws://127.0.0.1:{port}/v1/stream", reconnect_s=0.0) as client:
        streams = [client.complete([300 + index], max_tokens=arguments.tokens) for index in range(arguments.streams)]
        reading = asyncio.gather(*(_end(stream, index, arguments.tokens) for index, stream in enumerate(streams)))
        while not all(stream.accepted for stream in streams):
            await asyncio.sleep(0.001)
        await asyncio.sleep(when * STEP_S * arguments.tokens)
        os.kill(pid, signal.SIGTERM)
        signalled = time.monotonic()
        while client.draining is None and not reading.done():
            await asyncio.sleep(0.001)
        with contextlib.suppress(ClientConnectionError):  # all had ended: so has the connection
            try:
                await client.complete([1], max_tokens=5).result()
                ends["taken after the signal"] += 1
            except RemoteError as error:
                ends["refused" if error.remote_code == "draining" else error.remote_code] += 1
        ends.update(await reading)
    return ends, signalled


async def _end(stream: Stream, index: int, tokens: int) -> str:
    try:
        text = await stream.result()
    except (RemoteError, ClientConnectionError) as error:
        return f"failed: {error}"
    expected = "".join(f" w{(((300 + index) * 7919 + position * 31) % (VOCAB - 256))}" for position in range(tokens))
    return "finished" if text.lstrip() == expected.lstrip() else "wrong"


def _server(parent: Connection) -> None:
    configure_logs(level="error")
    complete = uvloop.run(_serve(parent))
    raise SystemExit(0 if complete else 1)


async def _serve(parent: Connection) -> bool:
    engine = FakeEngine(word_of, info=fake_info(vocab_size=VOCAB), interval_s=STEP_S)
    engine.start()
    async with TextStreams(engine, TextTokenizer(make_tokenizer(VOCAB))) as streams:
        server = Server(streams, ServerConfig(port=0))
        ready = asyncio.Event()
        running = asyncio.create_task(run_until_signalled(server, ready=ready))
        await ready.wait()
        parent.send(server.port)
        complete = await running
    await engine.close()
    return complete


if __name__ == "__main__":
    main()

"""10,000 requests whose clients go away at random moments: nothing of them may be left.

python -m benchmarks.abort_storm [--requests 10000] [--at-once 16] [--seed 1] [--quick]

The engine, its scheduler and its blocks are the real ones and prove their invariants after every step; the model is
arithmetic on slots (tests.engine.integers). Each client opens a socket, asks for ten streams and resets the connection while
they are queued, computing their prompt, decoding, just ended, or being resumed on a second connection.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import psutil
import uvloop

from benchmarks.report import print_setting, print_table
from benchmarks.timed import VOCAB as TOKENIZER_VOCAB
from benchmarks.workloads import make_tokenizer
from streamkv.logs import configure_logs
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer
from tests.core.model import VOCAB
from tests.engine.integers import NUM_BLOCKS, integer_engine

EACH = 10
PHASES = ("asked", "accepted", "prefill", "decode", "ended", "resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description="clients that go away at random moments")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=16, help="sockets (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="200 requests: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests = 200
    print_setting("streamkv", "aiohttp", "uvloop")
    configure_logs(level="error")
    uvloop.run(_measure(arguments))


async def _measure(arguments: argparse.Namespace) -> None:
    limits = SessionLimits(streams=EACH, queue=EACH, grace_s=0.05, resume_s=0.05)
    config = replace(ServerConfig(port=0, limits=limits, drain_timeout_s=0.0), slo_ttft_s=1e6, max_waiting=1_000_000)
    async with integer_engine() as (engine, _), TextStreams(engine, TextTokenizer(make_tokenizer(TOKENIZER_VOCAB))) as streams:
        server = Server(streams, config)
        async with server.listening():
            before = _left()
            phases: Counter[str] = Counter()
            began = time.monotonic()
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                storm = _Storm(http, server.port, random.Random(arguments.seed), phases)
                turns = iter(range(arguments.requests // EACH))
                await asyncio.gather(*(storm.work(turns) for _ in range(arguments.at_once)))
                await http.close()
            aborted = time.monotonic()
            stats = await engine.stats()
            while stats.running or stats.waiting or len(server.stream_door.sessions) or server.stream_door.connections:
                if time.monotonic() - aborted > 30:
                    break
                await asyncio.sleep(0.002)
                stats = await engine.stats()
            quiet = time.monotonic() - aborted
            gc.collect()
            after = _left()
            left = {
                "blocks in use": stats.blocks_used,
                "requests in the engine": stats.running + stats.waiting,
                "open streams": streams.num_open,
                "sessions": len(server.stream_door.sessions),
                "connections": len(server.stream_door.connections),
                "tasks": after["tasks"] - before["tasks"],
                "sockets": after["sockets"] - before["sockets"],
                "blocks missing from the pool": NUM_BLOCKS - stats.blocks_free - stats.blocks_cached - stats.blocks_used,
            }
    print_table(
        "Requests by what they were doing when their socket was reset", PHASES, [[phases[phase] * EACH for phase in PHASES]]
    )
    row = [f"{phases.total() * EACH:,} aborted", f"{aborted - began:.1f}", f"{quiet * 1000:.0f}", *left.values()]
    print_table("Left", ["", "seconds", "ms until quiet", *left], [row])
    if any(left.values()):
        raise SystemExit(f"left behind: {left}")


def _left() -> dict[str, int]:
    kinds = Counter(item.status for item in psutil.Process().net_connections("tcp"))
    kinds.pop("TIME_WAIT", 0)
    return {"tasks": len(asyncio.all_tasks()), "sockets": kinds.total()}


class _Storm:
    """Clients that behave badly."""

    def __init__(self, http: aiohttp.ClientSession, port: int, source: random.Random, phases: Counter[str]) -> None:
        self._http = http
        self._url = f"ws://127.0.0.1:{port}/v1/stream"
        self._source = source
        self._phases = phases

    async def work(self, turns: Any) -> None:
        """One client after the other."""
        for _ in turns:
            async with asyncio.timeout(60):
                await self._client(self._source.choice(PHASES))

    async def _client(self, phase: str) -> None:
        socket, welcome = await self._greet({"t": "hello"})
        for index in range(EACH):
            prompt = [self._source.randrange(VOCAB) for _ in range(self._source.randint(1, 60))]
            body = {"prompt": prompt, "max_tokens": self._source.randint(1, 60), "ignore_eos": True}
            gone = self._source.choice(["cancel", "grace"])
            await _send(socket, t="create", id=f"s{index}", api="completions", body=body, on_disconnect=gone)
        await self._until(socket, phase)
        _reset(socket)
        if phase == "resumed":
            await asyncio.sleep(self._source.uniform(0, 0.03))
            socket, _ = await self._greet({"t": "hello", "session": welcome["session"], "epoch": welcome["epoch"]})
            for index in range(EACH):
                await _send(socket, t="resume", id=f"s{index}", **{"from": 0})
            await asyncio.sleep(self._source.uniform(0, 0.005))
            _reset(socket)
        self._phases[phase] += 1

    async def _greet(self, hello: dict[str, Any]) -> tuple[aiohttp.ClientWebSocketResponse, dict[str, Any]]:
        socket = await self._http.ws_connect(self._url, protocols=("streamkv.v1.json",), compress=0)
        await _send(socket, **hello)
        return socket, msgspec.json.decode((await socket.receive()).data)

    async def _until(self, socket: aiohttp.ClientWebSocketResponse, phase: str) -> None:
        """Read until one of the streams, and not always the first one, is there."""
        if phase == "asked":
            await asyncio.sleep(self._source.choice([0.0, 0.001]))
            return
        left = self._source.randint(1, EACH)
        while left:
            message = msgspec.json.decode((await socket.receive()).data)
            reached = {
                "accepted": message["t"] == "accepted",
                "prefill": message["t"] == "status" and message["state"] in ("prefill", "decode"),
                "ended": message["t"] in ("done", "error"),
            }.get(phase, message["t"] == "delta")
            left -= reached or message["t"] in ("done", "error")


async def _send(socket: aiohttp.ClientWebSocketResponse, **message: Any) -> None:
    await socket.send_str(msgspec.json.encode(message).decode())


def _reset(socket: aiohttp.ClientWebSocketResponse) -> None:
    transport = socket.get_extra_info("socket") and socket._response.connection.transport  # noqa: SLF001  # no polite way to be rude
    assert transport is not None
    transport.abort()


if __name__ == "__main__":
    main()

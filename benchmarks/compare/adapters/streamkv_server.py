"""`streamkv serve` in a process of its own, and a client that reads all streams from one WebSocket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import uvloop

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.workloads import Job
from streamkv.client import connect
from streamkv.client.stream import Stream

_GENEROUS = ["--slo-ttft", "1e6", "--max-waiting", "4096"]
"""Nobody is refused: how work is admitted is measured elsewhere."""


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `engine`, the fields of `EngineConfig`."""
    settings = dict(options["engine"])
    command = [sys.executable, "-m", "streamkv", "serve", settings.pop("model"), "--port", "0", *_GENEROUS]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = next((line for line in server.stdout if line.startswith("ready.")), None)
        if ready is None:
            raise RuntimeError(f"streamkv serve ended with status {server.wait()}")
        url = ready.split()[-1]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            yield of_jobs(lambda batch: runner.run(_serve(url, batch)))
    finally:
        server.terminate()
        server.wait()


async def _serve(url: str, batch: Sequence[Job]) -> Served:
    async with connect(url) as client:
        began = perf_counter()
        streams = [client.complete(job.prompt, max_tokens=job.max_tokens, temperature=0, ignore_eos=True) for job in batch]
        times = await asyncio.gather(*(_read(stream, began) for stream in streams))
        return Served(perf_counter() - began, None, times)


async def _read(stream: Stream, began: float) -> list[float]:
    """When each token came."""
    times: list[float] = []
    async for delta in stream:
        times += [perf_counter() - began] * delta.n
    return times

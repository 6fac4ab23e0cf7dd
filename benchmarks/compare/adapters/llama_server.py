"""llama-server in a process of its own, and a client that reads one HTTP stream for each request."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import aiohttp
import uvloop

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.workloads import Job

_SLOTS = 32
_CACHE = {"bfloat16": "f16", "float32": "f32"}


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `binary`; `converted`, a GGUF file; `dtype` of the KV cache, `threads`, `slot_tokens`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads, cache = str(options["threads"]), _CACHE[options["dtype"]]
    command = [options["binary"], "--model", options["converted"], "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    command += ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * options["slot_tokens"]), "--no-kv-unified"]
    command += ["--threads", threads, "--threads-batch", threads, "--batch-size", "2048", "--ubatch-size", "512"]
    command += ["--cache-type-k", cache, "--cache-type-v", cache]
    server = subprocess.Popen(command)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_ready(port, server))
            yield of_jobs(lambda batch: runner.run(_serve(port, batch)))
    finally:
        server.terminate()
        server.wait()


async def _ready(port: int, server: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as http:
        while server.poll() is None:
            try:
                async with http.get(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError(f"llama-server ended with status {server.returncode}")


async def _serve(port: int, batch: Sequence[Job]) -> Served:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        began = perf_counter()
        read = await asyncio.gather(*(_read(http, port, job, began) for job in batch))
        return Served(perf_counter() - began, [tokens for tokens, _ in read], [times for _, times in read])


async def _read(http: aiohttp.ClientSession, port: int, job: Job, began: float) -> tuple[list[int], list[float]]:
    body = {
        "prompt": job.prompt,
        "n_predict": job.max_tokens,
        "samplers": ["top_k"],
        "top_k": 1,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": True,
        "stream": True,
        "return_tokens": True,
    }
    tokens: list[int] = []
    times: list[float] = []
    async with http.post(f"http://127.0.0.1:{port}/completion", json=body) as answer:
        async for line in answer.content:
            if answer.status != 200 or line.startswith(b"error"):
                raise RuntimeError(f"llama-server answered {answer.status}: {line[:300]!r}")
            if line.startswith(b"data: "):
                new = json.loads(line[6:]).get("tokens", [])
                tokens += new
                times += [perf_counter() - began] * len(new)
    return tokens, times

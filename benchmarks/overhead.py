"""What serving costs beside the model: mixed32 through the server, and through the engine alone.

python -m benchmarks.overhead [--rounds 3] [--model-dir FOLDER] [--quick]

The model of benchmarks.workloads. "Engine alone" submits the 32 requests to the engine and reads its steps; "server" has a
client in another process that reads 32 streams from one WebSocket. Each has a newly built engine, rounds take turns, prompts
are new in every round. The ratio is that of each round's pair. Beside the clock stands the processor time of the engine's
process, which suffers less from other work; OMP_NUM_THREADS=1 keeps the model's threads from waiting for each other there.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from benchmarks.report import print_setting, print_table
from benchmarks.server import child
from benchmarks.workloads import DEFAULT_MODEL_DIR, Job, build_model, jobs
from streamkv.client import connect
from streamkv.engine.api import EngineClient, EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.engine.thread import use_short_switch_interval
from streamkv.logs import configure_logs
from streamkv.protocol.limits import SessionLimits
from streamkv.sampling_params import Sampling
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="measure what serving costs beside the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR)
    parser.add_argument("--quick", action="store_true", help="tiny model, short requests, one round: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    print_setting("streamkv", "torch", "transformers", "aiohttp")
    configure_logs(level="error")
    use_short_switch_interval()
    model = build_model(arguments.model_dir, tiny=arguments.quick)
    pairs = uvloop.run(_measure(model, arguments))
    rows = []
    for index, name in enumerate(("by the clock", "processor time of the engine's process")):
        alone, served = ([pair[arm][index] for pair in pairs] for arm in (0, 1))
        ratios = [(b / a - 1) * 100 for a, b in zip(alone, served, strict=True)]
        each = ", ".join(f"{ratio:+.1f} %" for ratio in ratios)
        rows.append(
            [name, *(f"{statistics.median(arm):.3f}" for arm in (alone, served)), f"{statistics.median(ratios):+.1f} %", each]
        )
    title = f"mixed32, milliseconds per output token, {arguments.rounds} rounds"
    print_table(title, ["", "engine alone", "server", "overhead, median", "each round"], rows)


async def _measure(model: Path, arguments: argparse.Namespace) -> list[tuple[tuple[float, float], ...]]:
    """(engine alone, server), each (clock, processor time) in milliseconds a token, after one of each that does not count."""
    scale, vocab = (8, 512) if arguments.quick else (1, 32_000)
    settings = EngineConfig(model=str(model), dtype="float32" if arguments.quick else "bfloat16")
    pairs = []
    for turn in range(-1, arguments.rounds):
        size = scale if turn >= 0 else 8  # the first one only warms up
        # A server takes the engine's steps for itself: each arm has an engine of its own. Which is first alternates.
        found: dict[str, tuple[float, float]] = {}
        for arm in ("alone", "served") if turn % 2 else ("served", "alone"):
            work = jobs("mixed32", 2 * turn + (arm == "served"), vocab_size=vocab, scale=size)
            async with build_engine(settings) as engine:
                found[arm] = await (_alone(engine, work) if arm == "alone" else _served(engine, model, work))
        alone, served = found["alone"], found["served"]
        if turn >= 0:
            pairs.append((alone, served))
            print(f"round {turn + 1}: {alone[0]:.3f} and {served[0]:.3f} ms a token  ", flush=True)
    return pairs


async def _alone(engine: EngineClient, work: list[Job]) -> tuple[float, float]:
    began, cpu, tokens, left = time.perf_counter(), time.process_time(), 0, len(work)
    for index, job in enumerate(work):
        await engine.submit(EngineRequest((f"r{index}",), job.prompt, Sampling(max_tokens=job.max_tokens, temperature=0.0)))
    async for batch in engine.steps():
        for output in batch.outputs:
            tokens += len(output.token_ids)
            left -= output.finish_reason is not None
        if not left:
            break
    return _per_token(work, tokens, began), (time.process_time() - cpu) / tokens * 1000


def _per_token(work: list[Job], tokens: int, began: float) -> float:
    seconds = time.perf_counter() - began
    assert tokens == sum(job.max_tokens for job in work)
    return seconds / tokens * 1000


async def _served(engine: EngineClient, model: Path, work: list[Job]) -> tuple[float, float]:
    config = ServerConfig(port=0, limits=SessionLimits(streams=64), drain_timeout_s=0.0, slo_ttft_s=1e6)
    async with TextStreams(engine, load_tokenizer(model, max_tokens=engine.describe().max_model_len)) as streams:
        server = Server(streams, config)
        async with server.listening():
            with child(_client, server.port, work) as (_, client):
                await asyncio.to_thread(client.recv)
                cpu = time.process_time()
                client.send("go")
                found: float = await asyncio.to_thread(client.recv)
                return found, (time.process_time() - cpu) / sum(job.max_tokens for job in work) * 1000


def _client(parent: Connection, port: int, work: list[Job]) -> None:
    uvloop.run(_read(parent, port, work))


async def _read(parent: Connection, port: int, work: list[Job]) -> None:
    async with connect(f"ws://127.0.0.1:{port}/v1/stream") as client:
        parent.send("connected")
        parent.recv()
        began = time.perf_counter()
        streams = [client.complete(job.prompt, max_tokens=job.max_tokens, temperature=0, ignore_eos=True) for job in work]
        await asyncio.gather(*(stream.result() for stream in streams))
        parent.send(_per_token(work, sum(stream.num_tokens for stream in streams), began))


if __name__ == "__main__":
    main()

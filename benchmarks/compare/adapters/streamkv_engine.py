"""StreamKV's engine in its own process: token ids in, token ids out, as OpenVINO GenAI is driven."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from time import perf_counter
from typing import Any

import uvloop

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.workloads import Job
from streamkv.engine.api import EngineClient, EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.engine.thread import use_short_switch_interval
from streamkv.logs import configure_logs
from streamkv.sampling_params import Sampling


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `engine`, the fields of `EngineConfig`."""
    configure_logs(level="info")
    use_short_switch_interval()
    context = build_engine(EngineConfig(**options["engine"]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        engine = runner.run(context.__aenter__())
        try:
            yield of_jobs(lambda batch: runner.run(_serve(engine, batch)), backend=engine.describe().backend)
        finally:
            runner.run(context.__aexit__(None, None, None))


async def _serve(engine: EngineClient, batch: Sequence[Job]) -> Served:
    outputs: dict[str, list[int]] = {f"r{index}": [] for index in range(len(batch))}
    times: dict[str, list[float]] = {name: [] for name in outputs}
    left = len(batch)
    began = perf_counter()
    for name, job in zip(outputs, batch, strict=True):
        sampling = Sampling(max_tokens=job.max_tokens, temperature=0.0)  # the engine knows no end but this
        await engine.submit(EngineRequest((name,), job.prompt, sampling))
    async with aclosing(engine.steps()) as steps:  # type: ignore[type-var]  # it is an async generator
        async for step in steps:
            now = perf_counter() - began
            for output in step.outputs:
                outputs[output.id].extend(output.token_ids)
                times[output.id].extend([now] * len(output.token_ids))
                left -= output.finish_reason is not None
            if not left:
                break
    return Served(perf_counter() - began, list(outputs.values()), list(times.values()))

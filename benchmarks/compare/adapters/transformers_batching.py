"""transformers' continuous batching: each request with its own length, 512 tokens a step, block sharing on.

Its manager lives as long as one measurement, because an idle one keeps a thread awake; starting it is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.compare.hf import load
from benchmarks.workloads import Job


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `folder`, `dtype`, `threads`."""
    model = load(options)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def serve(batch: Sequence[Job]) -> Served:
        config = ContinuousBatchingConfig(num_blocks=176, max_batch_tokens=512)
        with model.continuous_batching_context_manager(generation_config=greedy, continuous_batching_config=config) as manager:
            _collect(manager, [Job(batch[0].prompt[:1], 1)], "first")
            began = perf_counter()
            outputs = _collect(manager, batch, "timed")
            return Served(perf_counter() - began, outputs, None)

    yield of_jobs(serve, capability=torch.backends.cpu.get_cpu_capability())


def _collect(manager: Any, batch: Sequence[Job], name: str) -> list[list[int]]:
    names = [f"{name}-{index}" for index in range(len(batch))]
    for request_id, job in zip(names, batch, strict=True):
        manager.add_request(job.prompt, request_id=request_id, max_new_tokens=job.max_tokens)
    finished: dict[str, list[int]] = {}
    while len(finished) < len(names):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching of transformers stopped")
        elif result.is_finished():
            finished[result.request_id] = list(result.generated_tokens)
    return [finished[request_id] for request_id in names]

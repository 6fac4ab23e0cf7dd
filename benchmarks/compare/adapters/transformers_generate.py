"""transformers' `generate`: one left-padded batch, SDPA; every row runs until the longest is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.compare.hf import load
from benchmarks.workloads import Job


class _Clock(BaseStreamer):
    """Notes when each step has ended. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """One call for the prompt, then one a step."""
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `folder`, `dtype`, `threads`."""
    model = load(options)

    def serve(batch: Sequence[Job]) -> Served:
        clock = _Clock()
        began = perf_counter()
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch])  # [rows, width]
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(job.max_tokens for job in batch)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0, streamer=clock)
        rows = output[:, width:].tolist()
        seconds = perf_counter() - began
        steps = [at - began for at in clock.times[1:]]
        return Served(
            seconds,
            [row[: job.max_tokens] for row, job in zip(rows, batch, strict=True)],
            [steps[: job.max_tokens] for job in batch],
        )

    yield of_jobs(serve, capability=torch.backends.cpu.get_cpu_capability())

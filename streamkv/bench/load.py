"""Send a trace: each request when it is due (open loop), or the next one when one of a fixed number has ended (closed loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from streamkv.bench.results import Outcome, Slo, Summary, summarise
from streamkv.bench.senders import Job, Sender
from streamkv.bench.trace import TraceRequest, prompt_of, shrink

__all__ = ["Plan", "drive"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be sent.

    Attributes:
        concurrency: requests at once; None = each when its trace says.
        speed: how much faster than in the trace they come.
        scale: divides lengths; a power of two.
        cancel_share: of requests that are given up after a random number of their tokens.
    """

    requests: Sequence[TraceRequest]
    seed: int
    concurrency: int | None = None
    speed: float = 1.0
    scale: int = 1
    cancel_share: float = 0.0
    slo: Slo = Slo()  # noqa: RUF009  # frozen

    def jobs(self) -> list[Callable[[], Job]]:
        """Prompts are made when they are sent: a long trace's would fill the memory."""
        source = Random(f"cancel {self.seed}")  # noqa: S311  # load, not secrets
        made: list[Callable[[], Job]] = []
        for request in self.requests:
            gives_up, share = source.random() < self.cancel_share, source.random()
            made.append(lambda request=request, stop=share if gives_up else None: self._job(request, stop))  # type: ignore[misc]  # bound now
        return made

    def _job(self, request: TraceRequest, stop: float | None) -> Job:
        _, tokens = shrink(request, self.scale)
        return Job(prompt_of(request, self.scale, self.seed), tokens, None if stop is None else int(stop * tokens))


async def drive(plan: Plan, sender: Sender) -> tuple[Summary, list[Outcome]]:
    """Send everything and wait for the last end."""
    if plan.concurrency is not None:
        await sender.prepare(min(plan.concurrency, len(plan.requests)))
    began = time.perf_counter()
    if plan.concurrency is None:
        outcomes = await _open_loop(plan, sender, began)
    else:
        outcomes = await _closed_loop(plan, sender, plan.concurrency)
    return summarise(outcomes, time.perf_counter() - began, plan.slo), outcomes


async def _open_loop(plan: Plan, sender: Sender, began: float) -> list[Outcome]:
    first = plan.requests[0].timestamp
    outcomes = [Outcome(began + (request.timestamp - first) / 1000 / plan.speed) for request in plan.requests]
    async with asyncio.TaskGroup() as group:
        for outcome, job in zip(outcomes, plan.jobs(), strict=True):
            await asyncio.sleep(outcome.due - time.perf_counter())
            group.create_task(sender.send(job(), outcome))
    return outcomes


async def _closed_loop(plan: Plan, sender: Sender, concurrency: int) -> list[Outcome]:
    jobs = iter(plan.jobs())
    outcomes: list[Outcome] = []

    async def work() -> None:
        for job in jobs:
            made = job()
            outcomes.append(outcome := Outcome(time.perf_counter()))
            await sender.send(made, outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(plan.requests))):
            group.create_task(work())
    return outcomes

"""Submit requests to an engine and collect what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from streamkv.engine.api import EngineClient, EngineRequest, StepOutput

DEADLINE_S = 60.0


@dataclass
class Collected:
    """Everything an engine said about one request."""

    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def last(self) -> StepOutput:
        return self.outputs[-1]

    @property
    def cached(self) -> int | None:
        return next((output.cached for output in self.outputs if output.cached is not None), None)

    @property
    def states(self) -> list[str]:
        return [output.state for output in self.outputs if output.state is not None]


class Reader:
    """The one consumer of an engine's steps."""

    def __init__(self, engine: EngineClient) -> None:
        self.requests: dict[str, Collected] = {}
        self.batches = 0
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._read(engine))

    async def _read(self, engine: EngineClient) -> None:
        async for batch in engine.steps():
            async with self._changed:
                self.batches += 1
                for output in batch.outputs:
                    collected = self.requests.setdefault(output.id, Collected())
                    assert not collected.outputs or collected.last.finish_reason is None, f"{output} follows the last output"
                    collected.outputs.append(output)
                self._changed.notify_all()

    async def finished(self, ids: Iterable[str]) -> dict[str, Collected]:
        """Wait until all of these have had their last output."""
        wanted = list(ids)

        def done() -> bool:
            return all(i in self.requests and self.requests[i].last.finish_reason is not None for i in wanted)

        await self._wait(done)
        return {request_id: self.requests[request_id] for request_id in wanted}

    async def tokens(self, request_id: str, count: int) -> None:
        """Wait until a request has at least `count` tokens."""
        await self._wait(lambda: request_id in self.requests and len(self.requests[request_id].tokens) >= count)

    async def _wait(self, condition: object) -> None:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(condition)  # type: ignore[arg-type]  # a plain predicate

    async def ended(self) -> None:
        """Wait until the engine has closed its stream of steps."""
        async with asyncio.timeout(DEADLINE_S):
            await self._task


async def run_all(engine: EngineClient, requests: list[EngineRequest]) -> dict[str, Collected]:
    """Submit all at once, wait for all."""
    reader = Reader(engine)
    for request in requests:
        await engine.submit(request)
    collected = await reader.finished([i for request in requests for i in request.ids])
    reader._task.cancel()
    return collected

"""An `EngineClient` without a model, for tests, benchmarks and people who build on the seam.

It keeps the seam's promises (one batch a step, exactly one last output a request, refusals, credit, cancel in every
state, drain) and computes nothing: every live request gets one token a step. `tests/engine/test_conformance.py` holds it
and the real engine to the same tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final, Literal

from streamkv.engine.api import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    KVMap,
    KVOwner,
    StepBatch,
    StepOutput,
    check_wish,
)
from streamkv.errors import ContextLengthError, DrainingError, InvalidRequestError, OverloadedError
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs

__all__ = ["FakeEngine", "Reply", "fake_info"]

Reply = Callable[[EngineRequest, int, int], int]
"""(request, branch, position of the output token) -> token id."""

_MAX_BATCHES: Final = 1024


def fake_info(*, vocab_size: int = 1024, max_model_len: int = 4096, embedding_dim: int = 0) -> EngineInfo:
    """Facts of a made-up model."""
    return EngineInfo(
        model="fake",
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=(),
        block_size=16,
        num_blocks=1024,
        max_num_seqs=1024,
        max_num_batched_tokens=1024,
        backend="none",
        dtype="none",
        epoch="fake",
        embedding_dim=embedding_dim,
    )


def _echo(request: EngineRequest, _branch: int, position: int) -> int:
    return request.prompt[position % len(request.prompt)]


@dataclass(slots=True)
class _Live:
    request: EngineRequest
    branch: int
    credit: int | None
    num_tokens: int = 0

    @property
    def parked(self) -> bool:
        """True if the client accepts no further token now."""
        return self.credit is not None and self.num_tokens >= self.credit


class FakeEngine:
    """Answers with ``reply`` (the prompt again and again by default), one token a request and step.

    Args:
        interval_s: time from one step to the next; 0 = as fast as the loop turns, and still yielding to it.
        max_live: requests (samples) at once; more are refused as overload.
    """

    def __init__(
        self, reply: Reply = _echo, *, info: EngineInfo | None = None, interval_s: float = 0.0, max_live: int = 4096
    ) -> None:
        """Nothing runs before `start`."""
        self._reply = reply
        self._info = info or fake_info()
        self._interval_s = interval_s
        self._max_live = max_live
        self._live: dict[str, _Live] = {}
        self._deadlines: dict[str, float] = {}  # of those that have not begun
        self._ended: list[StepOutput] = []
        self._batches: asyncio.Queue[StepBatch | None] = asyncio.Queue(_MAX_BATCHES)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._steps = self._prompt_tokens = self._output_tokens = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start stepping on the running loop."""
        self._task = asyncio.create_task(self._run(), name="streamkv-fake-engine")

    def describe(self) -> EngineInfo:
        """Constant facts about model and engine."""
        return self._info

    async def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises what `EngineClient.submit` says."""
        if self._draining:
            raise DrainingError("the server is shutting down; send the request to another one")
        # An id is in use until its last output is on its way, so that two requests' outputs never mix.
        used = self._live.keys() | {output.id for output in self._ended}
        if not request.ids or len(set(request.ids)) < len(request.ids) or not used.isdisjoint(request.ids):
            raise InvalidRequestError("every request id must be new and not in use", param="ids")
        if not request.prompt:
            raise InvalidRequestError("the prompt must have at least one token", param="prompt")
        if max(request.prompt) >= self._info.vocab_size or min(request.prompt) < 0:
            raise InvalidRequestError(f"every token id must be at least 0 and below {self._info.vocab_size}", param="prompt")
        if request.sampling.max_tokens < 0:
            raise InvalidRequestError("max_tokens must be at least 0", param="max_tokens")
        check_wish(request, self._info)
        longest = len(request.prompt) + request.sampling.max_tokens
        if longest > self._info.max_model_len:
            raise ContextLengthError(f"prompt and max_tokens make {longest} tokens, more than {self._info.max_model_len}")
        if len(self._live) + len(request.ids) > self._max_live:
            raise OverloadedError("too many requests; try again later")
        self._prompt_tokens += len(request.prompt) * len(request.ids)
        for branch, request_id in enumerate(request.ids, request.first_branch):
            self._live[request_id] = _Live(request, branch, request.credit)
            if request.queue_timeout_s is not None:
                self._deadlines[request_id] = time.monotonic() + request.queue_timeout_s
        self._idle.clear()
        self._wake.set()

    async def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request; unknown and finished ids are ignored."""
        if self._live.pop(request_id, None) is not None:
            self._deadlines.pop(request_id, None)
            self._ended.append(StepOutput(request_id, finish_reason=reason))
            self._wake.set()

    async def credit(self, request_id: str, limit: int) -> None:
        """Raise the absolute number of output tokens the client accepts."""
        live = self._live.get(request_id)
        if live is not None and live.credit is not None:
            live.credit = max(live.credit, limit)
            self._wake.set()

    async def steps(self) -> AsyncIterator[StepBatch]:
        """What steps produce, until the engine is closed."""
        while (batch := await self._batches.get()) is not None:
            yield batch

    async def stats(self) -> EngineStats:
        """Counters; blocks are made up: every live request holds one."""
        used = min(len(self._live), self._info.num_blocks)
        return EngineStats(
            waiting=0,
            running=len(self._live),
            blocks_free=self._info.num_blocks - used,
            blocks_cached=0,
            blocks_used=used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=0,
            output_tokens=self._output_tokens,
            preemptions=0,
            last_step_at=0.0,
        )

    async def kv_map(self) -> KVMap:
        """One full block for each live request, in the order of submission; the rest is free."""
        size, num_blocks = self._info.block_size, self._info.num_blocks
        shown = list(self._live.items())[:num_blocks]
        held, free = len(shown), num_blocks - len(shown)
        return KVMap(
            time.monotonic(),
            self._steps,
            size,
            states=b"\2" * held + bytes(free),
            owners=array("i", [*range(held), *[-1] * free]).tobytes(),
            counts=array("H", [1] * held + [0] * free).tobytes(),
            filled=array("H", [size] * held + [0] * free).tobytes(),
            idle_since=array("d", [float("nan")] * num_blocks).tobytes(),
            requests=tuple(
                KVOwner(request_id, live.request.salt, len(live.request.prompt), live.num_tokens, live.parked)
                for request_id, live in shown
            ),
        )

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for the rest, cancel what is left after ``timeout`` seconds."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        left = list(self._live)
        for request_id in left:
            await self.cancel(request_id)
        return not left

    async def close(self) -> None:
        """Stop; every unfinished request gets its last output first. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._draining = True
        for request_id in list(self._live):
            await self.cancel(request_id)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        outputs, self._ended = self._ended, []
        for item in ([StepBatch(outputs, time.monotonic())] if outputs else []) + [None]:
            while self._batches.full():
                self._batches.get_nowait()
            self._batches.put_nowait(item)

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            outputs = [*self._late(), *self._step()]
            if outputs:
                await self._batches.put(StepBatch(outputs, time.monotonic()))
                due = max(due + self._interval_s, time.monotonic() - self._interval_s)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                continue
            if not self._live:
                self._idle.set()
            self._wake.clear()
            timeout = max(0.0, min(self._deadlines.values()) - time.monotonic()) if self._deadlines else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            due = time.monotonic()

    def _late(self) -> list[StepOutput]:
        """End those that should have begun by now."""
        now = time.monotonic()
        late = [request_id for request_id, deadline in self._deadlines.items() if deadline <= now]
        for request_id in late:
            del self._deadlines[request_id], self._live[request_id]
        error = ("deadline_exceeded", "the request waited longer than its time limit; nothing of it was computed")
        return [StepOutput(request_id, finish_reason="error", error=error) for request_id in late]

    def _step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for request_id, live in list(self._live.items()):
            if live.parked:
                continue
            first = live.num_tokens == 0
            if first:
                self._deadlines.pop(request_id, None)
                outputs.append(StepOutput(request_id, state="prefill", cached=0, miss="not_cached"))
            sampling = live.request.sampling
            known = self._of_prompt(live) if first else None
            if sampling.max_tokens == 0:
                vector = bytes(4 * self._info.embedding_dim) if live.request.pooling is not None else None
                outputs.append(StepOutput(request_id, (), None, None, None, "length", None, known, vector, chunks=1))
                del self._live[request_id]
                continue
            token = self._reply(live.request, live.branch, live.num_tokens)
            live.num_tokens += 1
            reason: FinishReason | None = None
            if token in sampling.stop_token_ids and live.num_tokens > sampling.min_tokens:
                reason = "stop"
            elif live.num_tokens >= sampling.max_tokens:
                reason = "length"
            state: Literal["decode", "stalled"] | None = "decode" if first else None
            if reason is None and live.parked:
                state = "stalled"
            outputs.append(StepOutput(request_id, (token,), state, None, None, reason, None, known, chunks=int(first)))
            if reason is not None:
                del self._live[request_id]
        self._output_tokens += sum(len(output.token_ids) for output in outputs)
        if outputs:
            self._steps += 1
        ended, self._ended = self._ended, []
        return outputs + ended

    @staticmethod
    def _of_prompt(live: _Live) -> PromptLogprobs | None:
        """Every prompt token is certain."""
        if live.request.sampling.prompt_logprobs is None or live.branch:
            return None
        return PromptLogprobs(1, (TokenLogprobs(0.0, (), 1),) * (len(live.request.prompt) - 1))

"""The engine: one task that plans, runs and commits. It owns scheduler, cache and runner; everybody else sends it wishes.

    loop:  plan step n+1  ->  hand it to the runner thread  ->  wait for step n  ->  commit n  ->  one batch of outputs

While the runner computes, the event loop is free to send; while step n runs, step n + 1 is already planned and queued behind it:
on a processor in front of the runner, on a GPU behind it, so that the GPU goes from one step to the next without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import structlog

from streamkv.core.request import StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Event, Sampled, Step
from streamkv.engine.api import (
    STEP_TOKEN_BOUNDS,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    KVMap,
    StepBatch,
    StepOutput,
    check_wish,
)
from streamkv.engine.kv_view import take_kv_map
from streamkv.engine.squeeze import Squeeze
from streamkv.engine.thread import Pending, RunnerThread
from streamkv.errors import DrainingError, InvalidRequestError
from streamkv.runner.faults import DeviceLostError, is_out_of_memory, let_go
from streamkv.runner.params import RowExtra, RowParams
from streamkv.sampling_params import Pooling, Sampling

__all__ = ["InProcessEngine", "Runner"]

_MAX_BATCHES: Final = 1024
"""Step batches that wait for the consumer; a consumer that is further behind than this slows the engine down."""

_INTERNAL: Final = ("internal", "the engine failed while computing this request; other requests are not affected")
_OUT_OF_MEMORY: Final = (
    "out_of_memory",
    "the server has too little memory to compute this request even alone; send it again later, or a shorter one",
)

log = structlog.get_logger(__name__)


class Runner(Protocol):
    """What carries out steps; `streamkv.runner.model_runner.ModelRunner` in life, a fake in tests. Called in one thread."""

    def launch(self, step: Step, params: Mapping[int, RowParams]) -> Pending[Sampled]:
        """Carry out one step, or have a device begin; after an exception every later step raises until `resume`."""

    def resume(self) -> None:
        """Compute again after a failed step.

        Raises:
            DeviceLostError: nothing can be computed in this process any more.
        """

    def record_ahead(self) -> bool:
        """Nothing is to be done: do a little of what will save time later. False = there is nothing left of that."""


@dataclass(slots=True)
class _Asked:
    """What a live request wants of the runner, and how many prompt tokens' log-probabilities it has had."""

    sampling: Sampling
    branch: int
    pooling: Pooling | None
    inherited: int = 0
    reported: int = 0


class InProcessEngine:
    """`EngineClient` over a scheduler and a runner in this process. Create it with `streamkv.engine.build.build_engine`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        thread: RunnerThread,
        info: EngineInfo,
        *,
        look_ahead: bool = True,
        clock: Callable[[], float] = time.monotonic,
        check: bool = False,
        check_arguments: Mapping[str, Callable[[Any], None]] | None = None,
    ) -> None:
        """Take over all four; nothing runs before `start`.

        Args:
            check_arguments: by name of a logits processor, what raises `ValueError` for arguments that it cannot take.
            check: debug: prove the scheduler's invariants after every commit.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._thread = thread
        self._info = info
        self._depth = 2 if look_ahead else 1
        self._clock = clock
        self._check = check
        self._check_arguments = dict(check_arguments or {})
        self._squeeze = Squeeze(info.max_num_batched_tokens, info.block_size)
        self._asked: dict[str, _Asked] = {}
        self._flight: deque[tuple[Step, asyncio.Future[Sampled]]] = deque()
        self._batches: asyncio.Queue[StepBatch | None] = asyncio.Queue(_MAX_BATCHES)
        self._ended: list[Event] = []  # last events of cancelled requests, sent with the next batch
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._ahead = True  # the runner has something to record
        self._steps = 0
        self._step_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        self._computed_tokens = 0
        self._last_step_at = 0.0
        self._task: asyncio.Task[None] | None = None

    # -- EngineClient ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's task on the running loop."""
        self._task = asyncio.create_task(self._run(), name="streamkv-engine")

    def describe(self) -> EngineInfo:
        """Constant facts about model and engine."""
        return self._info

    def progress(self) -> tuple[float | None, float]:
        """(when the step that is being computed began, None = none is; processor time used for steps so far). For any thread."""
        return self._thread.busy_since, self._thread.computed()

    async def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises what `EngineClient.submit` says."""
        if self._draining:
            raise DrainingError("the server is shutting down; send the request to another one")
        if max(request.prompt, default=0) >= self._info.vocab_size or min(request.prompt, default=0) < 0:
            raise InvalidRequestError(f"every token id must be at least 0 and below {self._info.vocab_size}", param="prompt")
        for request_id in request.ids:
            # The scheduler forgets a cancelled request at once; here its last output may still be waiting to be sent.
            if request_id in self._asked:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="id")
        sampling = request.sampling
        check_wish(request, self._info)
        for name, arguments in sampling.processors:
            try:
                self._check_arguments[name](arguments)
            except ValueError as error:
                raise InvalidRequestError(f"logits processor {name!r}: {error}", param="logits_processors") from error
        self._scheduler.submit(
            request.ids,
            request.prompt,
            StopRule(sampling.max_tokens, frozenset(sampling.stop_token_ids), sampling.min_tokens),
            priority=request.priority,
            salt=request.salt,
            tenant=request.tenant,
            # What is wanted of every prompt token needs every prompt token computed.
            use_cache=request.use_cache and request.pooling is None and sampling.prompt_logprobs is None,
            credit=request.credit,
            fork_of=request.fork_of,
            deadline=None if request.queue_timeout_s is None else self._clock() + request.queue_timeout_s,
            speculate=sampling.is_memoryless and request.pooling is None,
        )
        for branch, request_id in enumerate(request.ids, request.first_branch):
            self._asked[request_id] = _Asked(sampling, branch, request.pooling, request.inherited)
        self._idle.clear()
        self._wake.set()

    async def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request in whatever state it is; unknown and finished ids are ignored."""
        event = self._scheduler.cancel(request_id, reason)
        if event is not None:
            self._ended.append(event)
            self._wake.set()

    async def credit(self, request_id: str, limit: int) -> None:
        """Raise the absolute number of output tokens the client accepts."""
        self._scheduler.credit(request_id, limit)
        self._wake.set()

    async def steps(self) -> AsyncIterator[StepBatch]:
        """What steps produce, until the engine is closed."""
        while (batch := await self._batches.get()) is not None:
            yield batch

    async def stats(self) -> EngineStats:
        """One consistent look at queue, blocks and counters."""
        stats, pool = self._scheduler.stats(), self._scheduler.cache.pool
        return EngineStats(
            waiting=stats.waiting,
            running=stats.running,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            blocks_used=pool.num_used,
            steps=self._steps,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            output_tokens=stats.output_tokens,
            preemptions=stats.preemptions,
            last_step_at=self._last_step_at,
            asleep=stats.parked,
            evictions=pool.num_evictions,
            step_tokens=tuple(self._step_tokens),
            computed_tokens=self._computed_tokens,
            drafts=stats.drafts,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            swapped_out=stats.swapped_out,
            swapped_in=stats.swapped_in,
            host_slots_used=stats.host_slots_used,
        )

    async def kv_map(self) -> KVMap:
        """One consistent look at every block."""
        # Nothing here is awaited and the scheduler lives on this loop: it stands between two of its calls.
        return take_kv_map(self._scheduler.cache, at=self._clock(), step=self._steps)

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for the rest, cancel what is left after `timeout` seconds."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        left = self._scheduler.live_ids()
        for request_id in left:
            await self.cancel(request_id)
        return not left

    async def close(self) -> None:
        """Stop; every unfinished request gets its last output first. Idempotent."""
        if self._task is None:
            self._thread.close()
            return
        task, self._task = self._task, None
        self._draining = True
        for request_id in self._scheduler.live_ids():
            await self.cancel(request_id)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().run_in_executor(None, self._thread.close)

    # -- the task -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The device is lost, or a bug of ours: nothing can be trusted now. Every stream learns of it, and the server ends.
            if isinstance(error, DeviceLostError):
                log.error("device_lost", error=error.message)  # noqa: TRY400  # the failed step is in the log with its traceback
            else:
                log.exception("engine_failed")
            self._draining = True
            for request_id in self._scheduler.live_ids():
                self._ended.append(Event(request_id, finish_reason="error", error=("engine_lost", "the engine failed")))
        finally:
            for _, future in self._flight:
                future.cancel()
            self._send_now()
            self._idle.set()

    async def _turn(self) -> None:
        """One round: plan and start at most one step, then finish at most one."""
        step = self._scheduler.plan(self._clock()) if len(self._flight) < self._depth else None
        if step is not None:
            self._start(step)
        if self._flight and (step is None or len(self._flight) == self._depth):
            await self._finish_oldest()
        elif step is None:
            await self._rest()

    def _start(self, step: Step) -> None:
        self._flight.append((step, self._launch(step)))

    def _launch(self, step: Step) -> asyncio.Future[Sampled]:
        return self._thread.launch(self._runner.launch, step, self._row_params(step))

    def _row_params(self, step: Step) -> dict[int, RowParams]:
        """By row, for whoever enters with this step."""
        params: dict[int, RowParams] = {}
        for row, request_id in step.admitted:
            asked = self._asked[request_id]
            tokens, num_prompt = self._scheduler.tokens_of(request_id)
            params[row] = RowParams(
                asked.sampling, asked.branch, tuple(tokens), num_prompt, asked.reported, asked.pooling, asked.inherited
            )
        return params

    async def _finish_oldest(self) -> None:
        step, future = self._flight[0]
        if len(self._flight) == 1:
            self._thread.flush()
        failure: Exception | None = None
        try:
            sampled = await future
        except Exception as error:
            failure = error  # outside of this block nothing else holds on to it
        if failure is not None:
            await self._recover(step, failure)
            return
        self._flight.popleft()
        await self._commit(step, sampled)

    async def _commit(self, step: Step, sampled: Sampled) -> None:
        events = self._scheduler.commit(step, sampled)
        self._steps += 1
        self._step_tokens[bisect_left(STEP_TOKEN_BOUNDS, step.num_tokens)] += 1
        self._computed_tokens += step.num_tokens
        self._last_step_at = self._clock()
        if self._squeeze.succeeded():
            log.info("larger_steps", tokens=self._squeeze.tokens)
            self._scheduler.squeeze(self._squeeze.tokens)
        if self._check:
            self._scheduler.check()
        await self._send(events)

    async def _rest(self) -> None:
        """Nothing to compute: deliver what is left, then sleep until somebody wants something or has waited too long."""
        await self._send(self._scheduler.take_events())
        if not self._scheduler.has_requests:
            self._idle.set()
        if not self._ended and self._ahead and not self._wake.is_set():
            await self._record_ahead()
            return
        if not self._ended:
            deadline = self._scheduler.next_deadline
            timeout = None if deadline is None else max(0.0, deadline - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
        self._wake.clear()

    async def _record_ahead(self) -> None:
        try:
            self._ahead = await self._thread.submit(self._runner.record_ahead)
        except Exception as error:  # any: the steps themselves can do without
            log.warning("recording_ahead_failed", exc_info=True)
            let_go(error)
            self._ahead = False

    # -- a step that failed ---------------------------------------------------------------------------------------

    async def _recover(self, step: Step, failure: Exception) -> None:
        """A step raised: end as few requests as can be, and go on.

        Everything in flight is forgotten. If memory was short, later steps are smaller. Else the request that breaks the step is
        looked for: all suspects once more (a passing fault), then in halves, one after the other without look-ahead. A group of
        one that fails is the offender.

        Raises:
            DeviceLostError: nothing can be computed in this process any more.
        """
        self._thread.flush()
        self._flight.popleft()  # asked twice, it would forget where it failed
        for _, future in self._flight:
            with contextlib.suppress(Exception):
                await future  # successors come back skipped
        self._flight.clear()
        suspects = await self._step_back(step, failure)
        if suspects is not None:
            await self._isolate(suspects)

    async def _step_back(self, step: Step, failure: Exception) -> list[str] | None:
        """Stand where the last commit left everything; if memory was short, have later steps take less than this one did.

        Returns:
            The requests that may have broken the step; None if none of them did, because memory was short.
        """
        what = {"step": step.id, "requests": len(step.rows), "tokens": step.num_tokens}
        short_of_memory = is_out_of_memory(failure)
        if short_of_memory:
            log.warning("out_of_memory", **what, error=str(failure))
        else:
            log.error("step_failed", **what, exc_info=failure)
        let_go(failure)
        suspects = self._scheduler.abandon()
        await self._thread.submit(self._runner.resume)
        if not short_of_memory:
            return suspects
        if not self._squeeze.failed(len(step.rows), step.num_tokens):
            await self._fail(suspects, _OUT_OF_MEMORY)
        elif self._squeeze.tokens < step.num_tokens:
            log.warning("smaller_steps", tokens=self._squeeze.tokens)
            self._scheduler.squeeze(self._squeeze.tokens)
        return None

    async def _isolate(self, suspects: list[str]) -> None:
        groups = [suspects]
        retried = False
        while groups:
            group = groups.pop()
            if await self._try(frozenset(group)):
                continue
            if not retried:
                retried = True
                groups.append(group)
            elif len(group) > 1:
                middle = len(group) // 2
                groups += [group[middle:], group[:middle]]
            else:
                await self._fail(group, _INTERNAL)

    async def _fail(self, request_ids: list[str], error: tuple[str, str]) -> None:
        """End these; the others do not notice."""
        for request_id in request_ids:
            event = self._scheduler.cancel(request_id, "error", error)
            if event is not None:
                log.error("request_failed", request=request_id, code=error[0])
                self._ended.append(event)
        await self._send([])

    async def _try(self, group: frozenset[str]) -> bool:
        """Advance just these requests by one step; False if it raises, and not for want of memory."""
        step = self._scheduler.plan(self._clock(), group)
        if step is None:
            return True
        launched = self._launch(step)
        self._thread.flush()
        failure: Exception | None = None
        try:
            sampled = await launched
        except Exception as error:
            failure = error
        if failure is None:
            await self._commit(step, sampled)
            return True
        return await self._step_back(step, failure) is None

    # -- outputs --------------------------------------------------------------------------------------------------

    async def _send(self, events: list[Event]) -> None:
        batch = self._batch(events)
        if batch is not None:
            await self._batches.put(batch)

    def _send_now(self) -> None:
        """The last batch and the end mark; a queue that is full loses its oldest batch rather than the end."""
        for item in (self._batch(self._scheduler.take_events()), None):
            if item is None or item.outputs:
                while self._batches.full():
                    self._batches.get_nowait()
                self._batches.put_nowait(item)

    def _batch(self, events: list[Event]) -> StepBatch | None:
        # A cancelled request's earlier events are purged by the scheduler; its last event comes after all others.
        outputs = [self._output(event) for event in events]
        if self._ended:
            outputs += [self._output(event) for event in self._ended]
            self._ended = []
        if not outputs:
            return None
        for output in outputs:
            if output.finish_reason is not None:
                self._asked.pop(output.id, None)
        if not self._scheduler.has_requests:
            self._idle.set()
        return StepBatch(outputs, self._clock())

    def _output(self, event: Event) -> StepOutput:
        # The core speaks plain strings; its reasons are those of the seam.
        reason = cast("FinishReason | None", event.finish_reason)
        if event.extra is None:
            return StepOutput(
                event.id, event.tokens, event.state, None, event.cached, reason, event.error, miss=event.miss, chunks=event.chunks
            )
        extra: RowExtra = event.extra
        if extra.prompt_logprobs is not None:
            self._asked[event.id].reported = extra.prompt_logprobs.start + len(extra.prompt_logprobs.entries)
        logprobs = None if extra.logprobs is None or not event.tokens else (extra.logprobs,)
        return StepOutput(
            event.id,
            event.tokens,
            event.state,
            logprobs,
            event.cached,
            reason,
            event.error,
            extra.prompt_logprobs,
            extra.embedding,
            event.miss,
            event.chunks,
        )

"""The whole policy: which requests, which token ranges, which blocks go into the next step.

    plan(now) -> Step                      decide; may be called once more while a step is in flight (one step of look-ahead)
    commit(step, sampled) -> list[Event]   take over what the oldest step in flight produced

Pure: no model, no event loop, no clock. The same calls with the same values give the same steps (`streamkv.core.replay`).

Policy, in the order `plan` applies it (`streamkv.core.planner`):

1. Every running request that decodes gets one token, then prompts in progress share what is left of the token budget, those
   of the tenant that has had least first.
2. If their blocks do not fit, victims lose theirs: parked ones first, then the lowest priority, then the tenant that has had
   most, then the cheapest to bring back. What they held is computed again later, or moved to host slots and back if that is
   cheaper and there is room. The first in rank that can run is never a victim, so somebody always finishes.
3. Waiting requests are admitted while a row, budget and blocks for all their tokens are there: the highest priority first, then
   the tenant that has had least, then whoever came first. One that shares an uncached prefix with a running request is held
   back until that has written it. Nothing of a request is computed once its deadline has passed.

Who waits and in which order is `streamkv.core.waiting`'s to know, where everybody stands `streamkv.core.roster`'s.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.lookup import PromptLookup
from streamkv.core.planner import Planner
from streamkv.core.request import Request, State, StopRule
from streamkv.core.roster import Roster
from streamkv.core.step import Event, Sampled, Step
from streamkv.errors import InvalidRequestError, OverloadedError

__all__ = ["Scheduler", "SchedulerStats"]

MAX_IN_FLIGHT = 2
"""The step that runs and the one planned ahead of it."""

_TOO_LATE: Final = ("deadline_exceeded", "the request waited longer than its time limit; nothing of it was computed")


class SchedulerStats(NamedTuple):
    """Counters since start, and sizes now."""

    waiting: int
    running: int
    parked: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    host_slots_used: int = 0


class Scheduler:
    """Owns requests, queue and KV cache. One owner calls it; it is not thread-safe."""

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self.config = config
        self.cache = cache
        self._roster = Roster(config.max_num_seqs, cache)
        self._planner = Planner(config, self._roster)
        self._clears: list[int] = []
        self._next_arrival = 0
        self._next_step = 0
        self._output_tokens = 0
        self._drafts = self._draft_tokens = self._accepted_tokens = 0

    # -- intake ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        ids: tuple[str, ...],
        prompt: list[int],
        stop: StopRule,
        *,
        priority: int = 0,
        salt: str = "",
        tenant: str = "",
        use_cache: bool = True,
        credit: int | None = None,
        fork_of: str | None = None,
        speculate: bool = False,
        deadline: float | None = None,
    ) -> None:
        """Queue one prompt and its parallel samples; all or none.

        Args:
            tenant: who takes turns with others, and has a share of the cache.
            speculate: let steps check drafts of its next tokens. What is sampled must not depend on what was sampled before
                beside the input tokens and the position: no penalties.
            fork_of: a live request; blocks of the tokens that the prompt begins with as it does are shared, copy-on-write, and
                not computed again. Once it has finished the prefix cache has what it has published.
            deadline: seconds on the clock of `plan`; a plan from then on ends them instead of beginning.

        Raises:
            InvalidRequestError: an id is in use, the prompt is empty, or it can never fit context or pool.
            OverloadedError: the queue is full.
        """
        self._refuse(ids, prompt, stop)
        root = self.cache.root(salt) if use_cache else None
        leader = self._roster.live.get(fork_of) if fork_of is not None else None
        shared = _common(leader.tokens, prompt) if leader is not None and leader.root == root else 0
        samples: list[Request] = []
        for request_id in ids:
            request = Request(
                request_id,
                prompt,
                stop,
                arrival=self._next_arrival,
                priority=priority if self.config.policy == "priority" else 0,
                credit=credit,
                root=root,
                use_cache=use_cache,
                salt=salt,
                tenant=tenant,
                leader=leader if shared else None,
                shared=shared,
                lookup=PromptLookup() if speculate and self.config.draft_rows else None,
            )
            self._next_arrival += 1
            if samples:
                request.keys = list(samples[0].keys)
            else:
                self.cache.extend_keys(request)
                leader, shared = request, len(prompt)  # the samples that follow share all of its prompt
            samples.append(request)
            self._roster.add(request)
        if deadline is not None:
            self._roster.waiting.set_deadline(samples, deadline)

    def _refuse(self, ids: tuple[str, ...], prompt: list[int], stop: StopRule) -> None:
        """Raise for what can never be served, or not now: before anything is queued."""
        if not ids or len(set(ids)) != len(ids):
            raise InvalidRequestError("a request needs distinct ids, at least one", param="ids")
        for request_id in ids:
            if request_id in self._roster.live:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="id")
        config, waiting = self.config, self._roster.waiting
        config.check_fits(len(prompt), stop.max_tokens, self.cache.block_size, self.cache.pool.num_blocks)
        if waiting.num_requests + len(ids) > config.max_queued_requests:
            raise OverloadedError(f"{waiting.num_requests} requests are waiting already; try again later")
        if waiting.num_tokens + len(prompt) * len(ids) > config.max_queued_tokens and waiting.num_requests:
            raise OverloadedError(f"{waiting.num_tokens} prompt tokens are waiting already; try again later")

    def cancel(self, request_id: str, reason: str = "cancelled", error: tuple[str, str] | None = None) -> Event | None:
        """End a request in whatever state it is; what a step in flight computes for it is dropped.

        Returns:
            Its last event, or None if the id is unknown or finished.
        """
        request = self._roster.live.get(request_id)
        if request is None:
            return None
        self._roster.finish(request)
        # Its last event goes out now; what an earlier plan noted about it must not follow.
        self._roster.events = [event for event in self._roster.events if event.id != request_id]
        return Event(request_id, finish_reason=reason, error=error)

    def credit(self, request_id: str, limit: int) -> None:
        """Raise the absolute number of output tokens the client accepts; lower values and unknown ids are ignored."""
        request = self._roster.live.get(request_id)
        if request is None or request.credit is None or limit <= request.credit:
            return
        request.credit = limit
        self._roster.waiting.wake(request)

    # -- plan -----------------------------------------------------------------------------------------------------

    def plan(self, now: float, only: frozenset[str] | None = None) -> Step | None:
        """Decide the next step; None if there is nothing to compute now.

        Args:
            now: seconds on the caller's monotonic clock; copied into the step.
            only: advance just these running requests and admit nobody (used to find which request breaks a step).
        """
        flight = self._roster.flight
        assert len(flight) < MAX_IN_FLIGHT, "commit the oldest step first"
        for request in self._roster.waiting.overdue(now):
            self._roster.finish(request)
            self._roster.events.append(Event(request.id, finish_reason="error", error=_TOO_LATE))
        if flight and self._roster.drafting >= flight[0][0].id:
            return None  # how far its requests have come is known when it has ended
        step = Step(self._next_step, now)
        self.cache.pool.now = now
        self.cache.host.begin()
        members = self._planner.plan(step, only)
        if not members:
            assert not step.tables, "a step without rows changed tables"
            return None
        step.clears.extend(self._clears)
        self._clears.clear()
        self.cache.host.move(step)
        self._next_step += 1
        flight.append((step, members))
        return step

    # -- commit ---------------------------------------------------------------------------------------------------

    def commit(self, step: Step, sampled: Sampled) -> list[Event]:
        """Take over what the oldest step in flight produced. Rows whose request has ended meanwhile are dropped."""
        roster = self._roster
        oldest, members = roster.flight.popleft()
        assert oldest is step, f"step {step.id} committed before step {oldest.id}"
        events = self.take_events()
        size, held = self.cache.block_size, roster.waiting.held
        failed, extras = sampled.failed, sampled.extras
        running, finished = State.RUNNING, State.FINISHED  # looked up once, not for every row
        for index, (request, count, new) in enumerate(zip(members, step.counts, sampled.tokens, strict=True)):
            if index in failed:
                # Whoever has left meanwhile has left its NaN behind the fence.
                self._clears.extend(self.cache.spoiled(request))
                if request.state is not finished:
                    events.append(self._fail_numerically(request))
                continue
            if request.state is finished:
                continue
            if step.samples[index] > 1:
                events.append(self._settle(request, step.samples[index] - 1, new))
                continue
            if request.state is running:
                request.computed += count
                if request.computed // size > request.published and request.root is not None:
                    roster.publish(request)
                if request.id in held and request.computed >= request.num_prompt - 1:
                    roster.waiting.release(request.id)
            extra = extras.get(index) if extras else None
            if new:
                events.append(self._append(request, new, extra))
            elif extra is not None:
                events.append(Event(request.id, extra=extra))
        self.cache.lift(step.id)
        return events

    def _settle(self, request: Request, drafted: int, new: tuple[int, ...]) -> Event:
        """Take over what came of drafts: the request has come as far as they were right, and one token further."""
        assert request.lookup is not None
        request.lookup.learn(len(request.tokens) + len(new), drafted, len(new) - 1)
        self._drafts += 1
        self._draft_tokens += drafted
        self._accepted_tokens += len(new) - 1
        return self._append(request, new, None, drafts=True)

    def _append(self, request: Request, new: tuple[int, ...], extra: object, *, drafts: bool = False) -> Event:
        """Add sampled tokens, end the request if one of them ends it. Also for one preempted after the step was planned.

        Args:
            drafts: the step had drafts as input; those before the last of `new` were right, and their KV is written.
        """
        tokens, stop, reason = request.tokens, request.stop, None
        first = len(tokens) == request.num_prompt
        request.pending -= 1
        if stop.max_tokens == 0:
            self._roster.finish(request)
            return Event(request.id, extra=extra, finish_reason="length", chunks=request.chunks)
        stop_ids, armed = stop.stop_token_ids, request.num_prompt + stop.min_tokens
        for position, token in enumerate(new, 1):
            tokens.append(token)
            if token in stop_ids and len(tokens) > armed:
                reason = "stop"
            elif len(tokens) >= request.limit:
                reason = "length"
            else:
                continue
            new = new[:position]
            break
        count = len(new)
        self._output_tokens += count
        request.account.served += count
        if request.row < 0:  # preempted
            self._roster.waiting.num_tokens += count
        if drafts and request.row >= 0:
            request.computed += count
            request.planned = request.computed
            self._roster.publish(request)
        if reason is not None:
            self._roster.finish(request)
        state: Literal["decode", "stalled"] | None = "decode" if first else None
        if reason is None and request.credit is not None and request.num_output >= request.credit:
            state = "stalled"
        return Event(request.id, new, state, extra, None, reason, chunks=request.chunks if first else 0)

    def _fail_numerically(self, request: Request) -> Event:
        """End a request whose logits are NaN or Inf: nothing more of it is published."""
        self._roster.finish(request)
        message = "the model produced NaN or Inf for this request; other requests are not affected"
        return Event(request.id, finish_reason="error", error=("numerical_error", message))

    def abandon(self) -> list[str]:
        """Forget all steps in flight after a failed forward pass: requests stand where the last commit left them.

        Blocks, rows and tables stay; what the steps would have written will be planned again.

        Returns:
            Ids of the running requests of the oldest step, the one that failed.
        """
        flight = self._roster.flight
        suspects = [r.id for r in flight[0][1] if r.state is State.RUNNING] if flight else []
        for _, members in flight:
            for request in members:
                request.pending = 0
                if request.state is State.RUNNING:
                    request.planned = request.computed
        if flight:
            self.cache.lift(flight[-1][0].id)
            self.cache.host.lose(flight[0][0].id)
        flight.clear()
        return suspects

    def squeeze(self, max_tokens: int) -> None:
        """While memory is short, steps have no more tokens than this. Requests beyond that many are preempted by the next `plan`.

        Args:
            max_tokens: at least 1; `max_num_batched_tokens` ends it.
        """
        assert 1 <= max_tokens <= self.config.max_num_batched_tokens
        self._planner.squeeze(max_tokens)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """True if some request has not had its last event."""
        return bool(self._roster.live)

    @property
    def next_deadline(self) -> float | None:
        """When a plan will have to end somebody who waits; None = nobody has a deadline."""
        return self._roster.waiting.next_deadline

    def take_events(self) -> list[Event]:
        """Events since the last commit, when no commit will follow soon."""
        events, self._roster.events = self._roster.events, []
        return events

    def tokens_of(self, request_id: str) -> tuple[list[int], int]:
        """(prompt and committed output, length of the prompt) of a live request. The list is the request's own: read it now."""
        request = self._roster.live[request_id]
        return request.tokens, request.num_prompt

    def live_ids(self) -> list[str]:
        """Every request without its last event, in the order of submission."""
        return list(self._roster.live)

    def stats(self) -> SchedulerStats:
        """Sizes and counters."""
        roster = self._roster
        return SchedulerStats(
            roster.waiting.num_requests,
            len(roster.running),
            roster.waiting.num_asleep,
            roster.num_preemptions,
            roster.num_prompt_tokens,
            roster.num_cached_tokens,
            self._output_tokens,
            self._drafts,
            self._draft_tokens,
            self._accepted_tokens,
            self.cache.host.num_out,
            self.cache.host.num_in,
            self.cache.host.num_used,
        )

    def check(self) -> None:
        """Prove the invariants of queue, rows and blocks. Raises AssertionError."""
        self._roster.check()


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(index for index in range(length) if one[index] != other[index])

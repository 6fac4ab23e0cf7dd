"""The whole policy: which requests, which token ranges, which blocks go into the next step.

    plan(now) -> Step                      decide; may be called once more while a step is in flight (one step of look-ahead)
    commit(step, sampled) -> list[Event]   take over what the oldest step in flight produced

Pure: no model, no event loop, no clock. The same calls with the same values give the same steps (`streamkv.core.replay`).

Policy, in the order `plan` applies it:

1. Every running request that decodes gets one token, then prompts in progress share what is left of the token budget.
2. If their blocks do not fit, victims lose theirs (recompute later): parked ones first, then the lowest priority, then the
   least to recompute. The first in rank that can run is never a victim, so somebody always finishes.
3. Waiting requests are admitted in rank order while a row, budget and blocks for all their tokens are there. One that shares
   an uncached prefix with a running request is held back until that has written it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

from streamkv.core.kv_cache import KVCache
from streamkv.core.request import Request, State, StopRule
from streamkv.core.step import PENDING, Event, Sampled, Step
from streamkv.errors import ContextLengthError, InvalidRequestError, KVCapacityError, OverloadedError

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats"]

MAX_IN_FLIGHT = 2
"""The step that runs and the one planned ahead of it."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and policy.

    Attributes:
        max_num_seqs: rows, i.e. most requests running at once.
        max_num_batched_tokens: token budget of a step.
        max_model_len: most tokens of a request, prompt and output.
        max_queued_requests: most requests waiting.
        max_queued_tokens: most prompt tokens waiting.
        policy: `fcfs` ignores priorities.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 4096
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    policy: Literal["fcfs", "priority"] = "fcfs"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Every running request must be able to decode in every step.
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError("policy must be fcfs or priority")


class SchedulerStats(NamedTuple):
    """Counters since start, and sizes now."""

    waiting: int
    running: int
    parked: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Scheduler:
    """Owns requests, queue and KV cache. One owner calls it; it is not thread-safe."""

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self.config = config
        self.cache = cache
        self._requests: dict[str, Request] = {}
        self._queue: list[tuple[int, int, Request]] = []  # heap by rank; who left the queue is dropped when he comes up
        self._queued: dict[str, Request] = {}  # who of the heap is really waiting
        self._asleep: dict[str, Request] = {}  # waiting without credit: not in the heap
        self._held: dict[bytes | str, list[Request]] = {}  # waiting for a digest, or for a leader's prompt, to be written
        self._writing: dict[bytes, Request] = {}  # digest -> running request that will write it
        self._running: dict[str, Request] = {}
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._flight: deque[tuple[Step, list[Request]]] = deque()
        self._events: list[Event] = []
        self._clears: list[int] = []
        self._num_waiting = 0
        self._waiting_tokens = 0
        self._next_arrival = 0
        self._next_step = 0
        self._preemptions = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

    # -- intake ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        ids: tuple[str, ...],
        prompt: list[int],
        stop: StopRule,
        *,
        priority: int = 0,
        salt: str = "",
        use_cache: bool = True,
        credit: int | None = None,
        fork_of: str | None = None,
    ) -> None:
        """Queue one prompt and its parallel samples; all or none.

        Args:
            fork_of: a live request; blocks of the tokens that the prompt begins with as it does are shared, copy-on-write, and
                not computed again. Once it has finished the prefix cache has what it has published.

        Raises:
            InvalidRequestError: an id is in use, the prompt is empty, or it can never fit context or pool.
            OverloadedError: the queue is full.
        """
        self._refuse(ids, prompt, stop)
        root = self.cache.root(salt) if use_cache else None
        leader = self._requests.get(fork_of) if fork_of is not None else None
        shared = _common(leader.tokens, prompt) if leader is not None and leader.root == root else 0
        sibling: Request | None = None
        for request_id in ids:
            request = Request(
                request_id,
                prompt,
                stop,
                arrival=self._next_arrival,
                priority=priority if self.config.policy == "priority" else 0,
                credit=credit,
                root=root,
                salt=salt,
                leader=leader if shared else None,
                shared=shared,
            )
            self._next_arrival += 1
            if sibling is None:
                self.cache.extend_keys(request)
                leader, shared, sibling = request, len(prompt), request  # the samples that follow share all of its prompt
            else:
                request.keys = list(sibling.keys)
            self._requests[request_id] = request
            self._num_waiting += 1
            self._waiting_tokens += len(prompt)
            self._enqueue(request)

    def _refuse(self, ids: tuple[str, ...], prompt: list[int], stop: StopRule) -> None:
        """Raise for what can never be served, or not now: before anything is queued."""
        config, size = self.config, self.cache.block_size
        if not ids or len(set(ids)) != len(ids):
            raise InvalidRequestError("a request needs distinct ids, at least one", param="ids")
        for request_id in ids:
            if request_id in self._requests:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="id")
        if not prompt:
            raise InvalidRequestError("the prompt is empty; send at least one token", param="prompt")
        if stop.max_tokens < 0:
            raise InvalidRequestError("max_tokens must be at least 0", param="max_tokens")
        total = len(prompt) + stop.max_tokens
        if total > config.max_model_len:
            raise ContextLengthError(
                f"prompt ({len(prompt)} tokens) plus max_tokens ({stop.max_tokens}) is {total}, "
                f"more than the context of {config.max_model_len}",
                param="prompt",
            )
        # The last sampled token is never fed back, so it needs no slot.
        blocks = -(-max(total - 1, len(prompt)) // size)
        if blocks > self.cache.pool.num_blocks:
            raise KVCapacityError(
                f"the request needs {blocks} KV blocks and the server has {self.cache.pool.num_blocks}; shorten it",
                param="prompt",
            )
        if self._num_waiting + len(ids) > config.max_queued_requests:
            raise OverloadedError(f"{self._num_waiting} requests are waiting already; try again later")
        if self._waiting_tokens + len(prompt) * len(ids) > config.max_queued_tokens and self._num_waiting:
            raise OverloadedError(f"{self._waiting_tokens} prompt tokens are waiting already; try again later")

    def cancel(self, request_id: str, reason: str = "cancelled", error: tuple[str, str] | None = None) -> Event | None:
        """End a request in whatever state it is; what a step in flight computes for it is dropped.

        Returns:
            Its last event, or None if the id is unknown or finished.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request)
        # Its last event goes out now; what an earlier plan noted about it must not follow.
        self._events = [event for event in self._events if event.id != request_id]
        return Event(request_id, finish_reason=reason, error=error)

    def credit(self, request_id: str, limit: int) -> None:
        """Raise the absolute number of output tokens the client accepts; lower values and unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None or request.credit is None or limit <= request.credit:
            return
        request.credit = limit
        if self._asleep.pop(request_id, None) is not None:
            self._enqueue(request)

    # -- plan -----------------------------------------------------------------------------------------------------

    def plan(self, now: float, only: frozenset[str] | None = None) -> Step | None:
        """Decide the next step; None if there is nothing to compute now.

        Args:
            now: seconds on the caller's monotonic clock; copied into the step.
            only: advance just these running requests and admit nobody (used to find which request breaks a step).
        """
        assert len(self._flight) < MAX_IN_FLIGHT, "commit the oldest step first"
        step = Step(self._next_step, now)
        self.cache.pool.now = now
        members: list[Request] = []
        chunks: list[Request] = []
        crowded = self._make_room() if only is None else False
        self._plan_decodes(step, members, chunks, only)
        for request in chunks:
            self._plan_chunk(step, members, request)
        if not crowded and only is None and self._free_rows and self._queue:
            self._admit(step, members)
        if not members:
            assert not step.tables, "a step without rows changed tables"
            return None
        step.clears.extend(self._clears)
        self._clears.clear()
        self._next_step += 1
        self._flight.append((step, members))
        return step

    def _plan_decodes(self, step: Step, members: list[Request], chunks: list[Request], only: frozenset[str] | None) -> None:
        """One token for every running request that has exactly one to compute; the others go to `chunks`."""
        size, pool = self.cache.block_size, self.cache.pool
        rows, starts, counts, samples, tokens = step.rows, step.starts, step.counts, step.samples, step.tokens
        step_id = step.id
        for request in self._running.values():
            planned = request.planned
            known = request.tokens
            length = len(known) + request.pending
            if length >= request.limit:
                continue  # the token in flight is its last
            if request.credit is not None and length - request.num_prompt >= request.credit:
                continue  # parked
            if only is not None and request.id not in only:
                continue
            if length - planned > 1:
                chunks.append(request)
                continue
            # A block can only be shared where a fork left it, and a fork copies its tail when it is admitted.
            if planned >= len(request.blocks) * size:
                if not pool.num_available:
                    continue  # blocks of a victim are fenced until the step in flight has ended
                self._grow(step, request, planned + 1)
            rows.append(request.row)
            starts.append(planned)
            counts.append(1)
            samples.append(True)
            tokens.append(known[planned] if planned < len(known) else PENDING)
            members.append(request)
            request.planned = planned + 1
            request.pending += 1
            request.last_step = step_id

    def _plan_chunk(self, step: Step, members: list[Request], request: Request) -> None:
        """As much of a prompt (or of what was preempted) as budget and blocks allow."""
        length = len(request.tokens)
        count = min(length - request.planned, self.config.max_num_batched_tokens - step.num_tokens)
        while count > 0:
            missing = self.cache.missing(request, request.planned + count) - self.cache.pool.num_available
            if missing <= 0:
                break
            count -= max(1, (missing - 1) * self.cache.block_size)
        if count <= 0:
            return
        start = request.planned
        self._grow(step, request, start + count)
        whole = start + count == length
        step.rows.append(request.row)
        step.starts.append(start)
        step.counts.append(count)
        step.samples.append(whole)
        step.tokens.extend(request.tokens[start : start + count])
        members.append(request)
        request.planned = start + count
        request.pending += whole
        request.last_step = step.id
        request.chunks += 1

    def _grow(self, step: Step, request: Request, end: int) -> None:
        first, ids, copies = self.cache.grow(request, end)
        if ids:
            step.tables.append((request.row, first, ids))
            step.copies.extend(copies)

    # -- preemption -----------------------------------------------------------------------------------------------

    def _make_room(self) -> bool:
        """Preempt until the next token of everybody who runs fits, fenced blocks counted as coming.

        Returns:
            True if memory is short: then nobody is admitted.
        """
        cache, running = self.cache, self._running
        available = cache.pool.num_available
        if available > 2 * len(running) or not running:
            # Nobody needs more than one new block and one copy; prompts in progress take what is there.
            return False
        guard = self._guard()
        demand = {request.id: self._demand(request, guard) for request in running.values()}
        needed = sum(demand.values())
        crowded = needed > available
        while needed > cache.pool.num_available + cache.num_fenced:
            victim = self._victim(guard)
            if victim is None:
                break  # only the guard is left; it fits, by `_refuse`
            needed -= demand[victim.id]
            self._preempt(victim)
        return crowded

    def _demand(self, request: Request, guard: Request | None) -> int:
        """Blocks without which the request cannot advance now. A prompt in progress may wait, unless it is the guard."""
        length = len(request.tokens) + request.pending
        if request.parked or length >= request.limit or (length - request.planned > 1 and request is not guard):
            return 0
        return self.cache.missing(request, request.planned + 1)

    def _guard(self) -> Request | None:
        """The running request that is never a victim: the first in rank that is not parked."""
        return min((r for r in self._running.values() if not r.parked), key=lambda r: r.rank, default=None)

    def _victim(self, guard: Request | None) -> Request | None:
        """Parked first, then the lowest priority, then the least to recompute, then the youngest."""
        candidates = (r for r in self._running.values() if r is not guard)
        return min(
            candidates,
            key=lambda r: (not r.parked, -r.priority, self.cache.own_tokens(r), -r.arrival),
            default=None,
        )

    def _preempt(self, request: Request) -> None:
        self._leave(request, State.PREEMPTED)
        request.num_preemptions += 1
        self._preemptions += 1
        self._num_waiting += 1
        self._waiting_tokens += len(request.tokens)
        self._events.append(Event(request.id, state="preempted"))
        self._enqueue(request)

    # -- admission ------------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        """Into the heap, or asleep if the client accepts nothing now."""
        if request.parked:
            self._asleep[request.id] = request
            return
        self._queued[request.id] = request
        heappush(self._queue, (request.priority, request.arrival, request))
        if len(self._queue) > 64 and len(self._queue) > 4 * len(self._queued):
            # Do not let dropped entries pile up.
            self._queue = [entry for entry in self._queue if entry[2].id in self._queued]
            heapify(self._queue)

    def _head(self) -> Request | None:
        """First in rank of those that can be admitted now."""
        queue = self._queue
        while queue:
            request = queue[0][2]
            if self._queued.get(request.id) is request:
                return request
            heappop(queue)
        return None

    def _admit(self, step: Step, members: list[Request]) -> None:
        while self._free_rows and step.num_tokens < self.config.max_num_batched_tokens:
            request = self._head()
            if request is None or self._in_flight(request):
                return  # preempted while a step of it runs: that step must be committed first
            self.cache.extend_keys(request)
            if self._hold(request):
                continue
            if not (self._admit_fork(request, step) if request.leader else self._admit_one(request, step)):
                return  # strict order: nobody overtakes the head, so it cannot starve
            self._plan_chunk(step, members, request)

    def _hold(self, request: Request) -> bool:
        """Take the request out of the queue until what it waits for is written; False if it need not wait."""
        leader = request.leader
        key: bytes | str | None = None
        if leader is not None:
            if leader.state is State.RUNNING or (leader.state is State.WAITING and leader.id not in self._asleep):
                # What a fork shares beyond the leader's prompt may be still to come, but a parked leader never gets on.
                needed = min(request.shared, len(request.tokens) - 1, leader.num_prompt - 1)
                # A leader that enters with this very step may get its prompt by a copy of this step: too early to share.
                ready = leader.computed >= needed and -1 < leader.entered < self._next_step
                key = None if ready else leader.id
            else:
                request.leader = None
        if key is None and request.leader is None and self._writing:
            key = self._written_by_others(request)
        if key is None:
            return False
        del self._queued[request.id]
        self._held.setdefault(key, []).append(request)
        return True

    def _written_by_others(self, request: Request) -> bytes | None:
        """Digest of the last of the consecutive blocks after the request's hit that a running request is writing."""
        hit = len(self.cache.lookup(request).blocks)
        last = (len(request.tokens) - 1) // self.cache.block_size
        found: bytes | None = None
        for digest, _ in request.keys[hit:last]:
            if digest not in self._writing:
                break
            found = digest
        return found

    def _release_held(self, key: bytes | str) -> None:
        for request in self._held.pop(key, ()):
            if request.state is not State.FINISHED:
                self._enqueue(request)

    def _admit_one(self, request: Request, step: Step) -> bool:
        cache = self.cache
        hit = cache.lookup(request)
        # One block in reserve for every running request: who is admitted should not be preempted right after.
        while (needed := cache.blocks_to_admit(request, hit) + len(self._running)) > cache.pool.num_available:
            if not self._running and not cache.num_fenced:
                break
            if needed <= cache.pool.num_available + cache.num_fenced or not self._preempt_parked():
                return False
            hit = cache.lookup(request)
        copies = cache.admit(request, hit)
        self._enter(request, step, copies)
        first = len(hit.blocks)
        for digest, _ in request.keys[first:]:
            self._writing.setdefault(digest, request)
        return True

    def _admit_fork(self, request: Request, step: Step) -> bool:
        """Share the leader's blocks; the copy of the shared tail is made by the chunk that follows at once."""
        leader = request.leader
        assert leader is not None
        if self.cache.pool.num_available < 1:
            if not self.cache.num_fenced:
                self._preempt_parked()
            if leader.state is not State.RUNNING or self.cache.pool.num_available < 1:
                return False  # the leader itself was parked and lost its blocks, or they are fenced: next plan
        request.leader = None
        self.cache.fork(leader, request)
        self._enter(request, step, [])
        return True

    def _preempt_parked(self) -> bool:
        """Take the blocks of one running request whose client does not read; False if there is none."""
        # Not of one that got its last accepted token planned a moment ago: its row is in this very step.
        parked = [r for r in self._running.values() if r.parked and r.last_step < self._next_step]
        if not parked:
            return False
        self._preempt(min(parked, key=lambda r: (-r.priority, self.cache.own_tokens(r), -r.arrival)))
        return True

    def _enter(self, request: Request, step: Step, copies: list[tuple[int, int]]) -> None:
        del self._queued[request.id]
        request.move(State.RUNNING)
        request.row = self._free_rows.pop()
        request.entered = step.id
        self._running[request.id] = request
        self._num_waiting -= 1
        first_time = request.cached < 0
        miss = self.cache.miss(request) if first_time else None
        self._waiting_tokens -= request.num_prompt if first_time else len(request.tokens)
        if first_time:
            request.cached = request.computed
            self._prompt_tokens += request.num_prompt
            self._cached_tokens += request.cached
        self._events.append(Event(request.id, state="prefill", cached=request.cached, miss=miss))
        step.admitted.append((request.row, request.id))
        if request.blocks:
            step.tables.append((request.row, 0, tuple(request.blocks)))
        step.copies.extend(copies)

    # -- commit ---------------------------------------------------------------------------------------------------

    def commit(self, step: Step, sampled: Sampled) -> list[Event]:
        """Take over what the oldest step in flight produced. Rows whose request has ended meanwhile are dropped."""
        oldest, members = self._flight.popleft()
        assert oldest is step, f"step {step.id} committed before step {oldest.id}"
        events = self._events
        self._events = []
        size = self.cache.block_size
        failed, extras = sampled.failed, sampled.extras
        for index, (request, count, new) in enumerate(zip(members, step.counts, sampled.tokens, strict=True)):
            if index in failed:
                # Whoever has left meanwhile has left its NaN behind the fence.
                self._clears.extend(self.cache.spoiled(request))
                if request.state is not State.FINISHED:
                    events.append(self._fail_numerically(request))
                continue
            if request.state is State.FINISHED:
                continue
            if request.state is State.RUNNING:
                request.computed += count
                if request.computed // size > request.published and request.root is not None:
                    self._publish(request)
                if request.id in self._held and request.computed >= request.num_prompt - 1:
                    self._release_held(request.id)
            extra = extras.get(index) if extras else None
            if new:
                events.append(self._append(request, new, extra))
            elif extra is not None:
                events.append(Event(request.id, extra=extra))
        self.cache.lift(step.id)
        return events

    def _append(self, request: Request, new: tuple[int, ...], extra: object) -> Event:
        """Add sampled tokens, end the request if one of them ends it. Also for one preempted after the step was planned."""
        tokens, stop, reason = request.tokens, request.stop, None
        first = len(tokens) == request.num_prompt
        request.pending -= 1
        if stop.max_tokens == 0:
            self._finish(request)
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
        self._output_tokens += len(new)
        if request.state is State.PREEMPTED:
            self._waiting_tokens += len(new)
        if reason is not None:
            self._finish(request)
        state: Literal["decode", "stalled"] | None = "decode" if first else None
        if reason is None and request.credit is not None and request.num_output >= request.credit:
            state = "stalled"
        return Event(request.id, new, state, extra, None, reason, chunks=request.chunks if first else 0)

    def _fail_numerically(self, request: Request) -> Event:
        """End a request whose logits are NaN or Inf: nothing more of it is published."""
        self._finish(request)
        message = "the model produced NaN or Inf for this request; other requests are not affected"
        return Event(request.id, finish_reason="error", error=("numerical_error", message))

    def abandon(self) -> list[str]:
        """Forget all steps in flight after a failed forward pass: requests stand where the last commit left them.

        Blocks, rows and tables stay; what the steps would have written will be planned again.

        Returns:
            Ids of the running requests of the oldest step, the one that failed.
        """
        suspects = [r.id for r in self._flight[0][1] if r.state is State.RUNNING] if self._flight else []
        for _, members in self._flight:
            for request in members:
                request.pending = 0
                if request.state is State.RUNNING:
                    request.planned = request.computed
        if self._flight:
            self.cache.lift(self._flight[-1][0].id)
        self._flight.clear()
        return suspects

    def _publish(self, request: Request) -> None:
        for digest in self.cache.publish(request):
            if self._writing.get(digest) is request:
                del self._writing[digest]
                self._release_held(digest)

    # -- leaving --------------------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        if request.state is State.RUNNING:
            self._leave(request, State.FINISHED)
        else:
            self._num_waiting -= 1
            self._waiting_tokens -= request.num_prompt if request.cached < 0 else len(request.tokens)
            self._queued.pop(request.id, None)
            self._asleep.pop(request.id, None)
            request.move(State.FINISHED)
            self._release_held(request.id)
        request.leader = None
        del self._requests[request.id]

    def _leave(self, request: Request, state: State) -> None:
        """Give back row and blocks."""
        in_flight = self._in_flight(request)
        self._free_rows.append(request.row)
        request.row = -1
        del self._running[request.id]
        request.move(state)
        for digest, _ in request.keys[request.published :]:
            if self._writing.get(digest) is request:
                del self._writing[digest]
                self._release_held(digest)
        self.cache.free(request, request.last_step if in_flight else None)
        self._release_held(request.id)

    def _in_flight(self, request: Request) -> bool:
        """True if a step in flight has a row of this request."""
        return bool(self._flight) and request.last_step >= self._flight[0][0].id

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True if a plan could have something to do, now or after a commit."""
        return bool(self._queued or self._held or self._flight or self._running)

    @property
    def has_requests(self) -> bool:
        """True if some request has not had its last event."""
        return bool(self._requests)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not committed."""
        return len(self._flight)

    def take_events(self) -> list[Event]:
        """Events since the last commit, when no commit will follow soon."""
        events, self._events = self._events, []
        return events

    def tokens_of(self, request_id: str) -> tuple[list[int], int]:
        """(prompt and committed output, length of the prompt) of a live request. The list is the request's own: read it now."""
        request = self._requests[request_id]
        return request.tokens, request.num_prompt

    def live_ids(self) -> list[str]:
        """Every request without its last event, in the order of submission."""
        return list(self._requests)

    def stats(self) -> SchedulerStats:
        """Sizes and counters."""
        return SchedulerStats(
            self._num_waiting,
            len(self._running),
            len(self._asleep),
            self._preemptions,
            self._prompt_tokens,
            self._cached_tokens,
            self._output_tokens,
        )

    def check(self) -> None:
        """Prove the invariants of queue, rows and blocks. Raises AssertionError."""
        self.cache.check()
        rows = [request.row for request in self._running.values()]
        assert len(set(rows)) == len(rows), "two requests share a row"
        assert sorted(rows + self._free_rows) == list(range(self.config.max_num_seqs)), "a row is lost"
        for request in self._running.values():
            assert request.state is State.RUNNING, f"{request} runs in the wrong state"
            assert request.computed < len(request.tokens) or request.pending, f"{request} has nothing to do"
        held = {r.id for group in self._held.values() for r in group if r.state is not State.FINISHED}
        waiting = set(self._queued) | set(self._asleep) | held
        assert len(self._queued) + len(self._asleep) + len(held) == len(waiting) == self._num_waiting, "a request waits twice"
        assert waiting | set(self._running) == set(self._requests), "a request is lost"
        assert all(r.state is State.RUNNING and r.keys for r in self._writing.values()), "a dead request is said to write"
        if not self._requests and not self._flight:
            assert not self._held, "somebody is held back by nobody"
            assert not self._waiting_tokens, "waiting tokens are miscounted"
            assert not self.cache.pool.num_used, "blocks leak"


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(index for index in range(length) if one[index] != other[index])

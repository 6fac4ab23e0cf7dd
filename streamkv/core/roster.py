"""Where every request stands: who waits, who runs in which row, who writes which prefix, which steps are under way.

The only place that moves a request from one state to another. Planner and scheduler decide; this keeps the books.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from streamkv.core.kv_cache import KVCache
from streamkv.core.request import Request, State
from streamkv.core.step import Event, Step
from streamkv.core.waiting import Waiting

__all__ = ["Roster"]


class Roster:
    """All requests without their last event.

    Attributes:
        live: all of them, in the order of submission.
        running: those with a row, in the order of admission.
        waiting: those without.
        flight: steps that are planned and not committed, the oldest first, each with the requests of its rows.
        writing: digest -> the running request that will write that block.
        events: what happened since the last commit.
        drafting: id of the last step that checks drafts; -1 before.
        max_running: most requests that may compute at once; fewer than there are rows only while memory is short.
    """

    def __init__(self, num_rows: int, cache: KVCache) -> None:
        self.cache = cache
        self.live: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.waiting = Waiting()
        self.flight: deque[tuple[Step, list[Request]]] = deque()
        self.writing: dict[bytes, Request] = {}
        self.events: list[Event] = []
        self.drafting = -1
        self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = 0
        self._num_rows = self.max_running = num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def has_row(self) -> bool:
        """True if one more request could run."""
        if self.max_running >= self._num_rows:
            return bool(self._free_rows)
        # Who is parked computes nothing, and must not keep the only place for ever.
        return bool(self._free_rows) and sum(not request.parked for request in self.running.values()) < self.max_running

    # -- moves ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take in a new request; it waits."""
        self.live[request.id] = request
        self.waiting.join(request)

    def enter(self, request: Request, step: Step, copies: list[tuple[int, int]]) -> None:
        """A waiting request that has its blocks gets a row and is in `step` from now on."""
        self.waiting.take(request)
        request.move(State.RUNNING)
        request.row = self._free_rows.pop()
        request.entered = step.id
        self.running[request.id] = request
        first_time = request.cached < 0
        miss = self.cache.miss(request) if first_time else None
        if first_time:
            request.cached = request.charged = request.computed
            self.num_prompt_tokens += request.num_prompt
            self.num_cached_tokens += request.cached
        self.events.append(Event(request.id, state="prefill", cached=request.cached, miss=miss))
        step.admitted.append((request.row, request.id))
        if request.blocks:
            step.tables.append((request.row, 0, tuple(request.blocks)))
        step.copies.extend(copies)

    def preempt(self, request: Request, step: Step) -> None:
        """Take row and blocks from a running request; it waits again. `step` is being planned, and moves out what is saved."""
        self.cache.save(request, step.id)
        self._leave(request, State.PREEMPTED)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.events.append(Event(request.id, state="preempted"))
        self.waiting.add(request)

    def finish(self, request: Request) -> None:
        """End a request in whatever state it is."""
        if request.state is State.RUNNING:
            self._leave(request, State.FINISHED)
        else:
            request.move(State.FINISHED)
            self.waiting.drop(request)
            self.waiting.release(request.id)
            self.cache.host.drop(request)
        self.waiting.leave(request)
        request.leader = None
        del self.live[request.id]

    def _leave(self, request: Request, state: State) -> None:
        """Give back row and blocks."""
        in_flight = self.in_flight(request)
        self._free_rows.append(request.row)
        request.row = -1
        del self.running[request.id]
        request.move(state)
        self._no_longer_writes((digest for digest, _ in request.keys[request.published :]), request)
        self.cache.free(request, request.last_step if in_flight else None)
        self.waiting.release(request.id)

    def in_flight(self, request: Request) -> bool:
        """True if a step in flight has a row of this request."""
        return bool(self.flight) and request.last_step >= self.flight[0][0].id

    # -- prefixes -------------------------------------------------------------------------------------------------

    def publish(self, request: Request) -> None:
        """Its full blocks can be found from now on; who waited for one of them goes on."""
        self._no_longer_writes(self.cache.publish(request), request)

    def _no_longer_writes(self, digests: Iterable[bytes], request: Request) -> None:
        for digest in digests:
            if self.writing.get(digest) is request:
                del self.writing[digest]
                self.waiting.release(digest)

    # -- self-check -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the invariants of queue, rows and blocks. Raises AssertionError."""
        self.cache.check()
        rows = [request.row for request in self.running.values()]
        assert len(set(rows)) == len(rows), "two requests share a row"
        assert sorted(rows + self._free_rows) == list(range(self._num_rows)), "a row is lost"
        for request in self.running.values():
            assert request.state is State.RUNNING, f"{request} runs in the wrong state"
            assert request.computed < len(request.tokens) or request.pending, f"{request} has nothing to do"
        waiting = self.waiting.check()
        assert waiting | set(self.running) == set(self.live), "a request is lost"
        assert all(r.state is State.PREEMPTED for r in self.cache.host.holders()), "the host keeps what nobody waits for"
        assert all(r.state is State.RUNNING and r.keys for r in self.writing.values()), "a dead request is said to write"
        if not self.live and not self.flight:
            assert not self.waiting.held, "somebody is held back by nobody"
            assert not self.cache.pool.num_used, "blocks leak"
            assert not self.cache.host.num_used, "host slots leak"

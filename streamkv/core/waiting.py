"""Everybody who waits for a place: in line, asleep, or held back.

    in line    may be admitted now: the highest priority first, then tenants in turns, then whoever came first
    asleep     the client accepts no token now: `wake` brings it back
    held back  somebody else is computing the prefix that it begins with: `release` brings it back

Every waiting request is in exactly one of the three.
"""

from __future__ import annotations

from bisect import insort
from heapq import heapify, heappop, heappush

from streamkv.core.fairness import Line
from streamkv.core.request import Request, State

__all__ = ["Waiting"]


class Waiting:
    """The queue. O(log n) for each request that comes or goes.

    Attributes:
        held: those who are held back, by what they wait for. To be read only.
        num_requests: all who wait.
        num_tokens: tokens of all of them, to be computed or found.
    """

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}  # by priority; one that nobody of lives any more is dropped
        self._priorities: list[int] = []  # of the lines, in order
        self._asleep: dict[str, Request] = {}
        self.held: dict[bytes | str, list[Request]] = {}
        self._deadlines: list[tuple[float, int, list[Request]]] = []  # heap of (when, arrival, samples of one prompt)
        self.num_requests = 0
        self.num_tokens = 0

    # -- coming and going -----------------------------------------------------------------------------------------

    def join(self, request: Request) -> None:
        """Take in a new request."""
        line = self._lines.get(request.priority)
        if line is None:
            line = self._lines[request.priority] = Line()
            insort(self._priorities, request.priority)
        request.account = line.join(request.tenant)
        self.add(request)

    def add(self, request: Request) -> None:
        """It waits: it is new, or has been preempted."""
        self.num_requests += 1
        self.num_tokens += len(request.tokens)
        self._queue(request)

    def take(self, request: Request) -> None:
        """It runs now."""
        self.num_requests -= 1
        self.num_tokens -= len(request.tokens)
        self._lines[request.priority].take(request)

    def drop(self, request: Request) -> None:
        """It has ended while it waited, in whichever of the three. It is `FINISHED` already, for those who hold it back."""
        self.num_requests -= 1
        self.num_tokens -= len(request.tokens)
        self._lines[request.priority].remove(request)
        self._asleep.pop(request.id, None)

    def leave(self, request: Request) -> None:
        """It has had its last event, wherever it was."""
        line = self._lines[request.priority]
        line.leave(request.tenant)
        if not line.num_live:
            del self._lines[request.priority]
            self._priorities.remove(request.priority)

    def _queue(self, request: Request) -> None:
        """Into the line, or asleep if the client accepts nothing now."""
        if request.parked:
            self._asleep[request.id] = request
        else:
            self._lines[request.priority].push(request)

    def head(self) -> Request | None:
        """Whose turn it is, of those in line."""
        for priority in self._priorities:
            if (head := self._lines[priority].head()) is not None:
                return head
        return None

    # -- asleep, held back ----------------------------------------------------------------------------------------

    def wake(self, request: Request) -> None:
        """Back into the line if it was asleep."""
        if self._asleep.pop(request.id, None) is not None:
            self._queue(request)

    def hold(self, request: Request, key: bytes | str) -> None:
        """Out of the line, until `release(key)`."""
        self._lines[request.priority].remove(request)
        self.held.setdefault(key, []).append(request)

    def release(self, key: bytes | str) -> None:
        """What these waited for is there, or will not come: back into the line."""
        for request in self.held.pop(key, ()):
            if request.state is not State.FINISHED:
                self._queue(request)

    # -- too late -------------------------------------------------------------------------------------------------

    def set_deadline(self, samples: list[Request], deadline: float) -> None:
        """None of these is worth beginning once the clock says `deadline`."""
        heappush(self._deadlines, (deadline, samples[0].arrival, samples))
        if len(self._deadlines) > 64 and len(self._deadlines) > 4 * self.num_requests:
            # Do not let those that have begun or ended in time pile up.
            self._deadlines = [entry for entry in self._deadlines if _waits(entry[2])]
            heapify(self._deadlines)

    def overdue(self, now: float) -> list[Request]:
        """Those whose deadline has passed and of whose prompt nothing has been computed; each is named once."""
        late: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            samples = heappop(self._deadlines)[2]
            if _waits(samples):
                late += [request for request in samples if request.state is State.WAITING]
        return late

    @property
    def next_deadline(self) -> float | None:
        """When somebody will be overdue next; None = nobody will."""
        while self._deadlines and not _waits(self._deadlines[0][2]):
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def num_asleep(self) -> int:
        """Those who wait for credit."""
        return len(self._asleep)

    def check(self) -> set[str]:
        """Prove that everybody waits once, and return who waits. Raises AssertionError."""
        assert self._priorities == sorted(self._lines), "a line is lost"
        for line in self._lines.values():
            line.check()
        held = [r.id for group in self.held.values() for r in group if r.state is not State.FINISHED]
        everybody = [*(request_id for line in self._lines.values() for request_id in line.ids()), *self._asleep, *held]
        assert len(everybody) == len(set(everybody)) == self.num_requests, "a request waits twice"
        assert everybody or not self.num_tokens, "waiting tokens are miscounted"
        return set(everybody)


def _waits(samples: list[Request]) -> bool:
    """True if some are alive and none has begun: the prompt is computed for all of them at once."""
    return all(request.cached < 0 for request in samples) and any(request.state is State.WAITING for request in samples)

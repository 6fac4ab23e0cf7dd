"""Everybody who waits for a place: in line by rank, asleep, or held back.

    in line    may be admitted now, first in rank first
    asleep     the client accepts no token now: `wake` brings it back
    held back  somebody else is computing the prefix that it begins with: `release` brings it back

Every waiting request is in exactly one of the three.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

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
        self._line: list[tuple[int, int, Request]] = []  # heap by rank; who has left the line is dropped when he comes up
        self._ready: dict[str, Request] = {}  # who of the heap is really in line
        self._asleep: dict[str, Request] = {}
        self.held: dict[bytes | str, list[Request]] = {}
        self.num_requests = 0
        self.num_tokens = 0

    # -- coming and going -----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take in a new or a preempted request."""
        self.num_requests += 1
        self.num_tokens += len(request.tokens)
        self._queue(request)

    def remove(self, request: Request) -> None:
        """It runs now, or has ended. One that is held back must have been moved to `FINISHED`."""
        self.num_requests -= 1
        self.num_tokens -= len(request.tokens)
        self._ready.pop(request.id, None)
        self._asleep.pop(request.id, None)

    def _queue(self, request: Request) -> None:
        """Into the line, or asleep if the client accepts nothing now."""
        if request.parked:
            self._asleep[request.id] = request
            return
        self._ready[request.id] = request
        heappush(self._line, (request.priority, request.arrival, request))
        if len(self._line) > 64 and len(self._line) > 4 * len(self._ready):
            # Do not let dropped entries pile up.
            self._line = [entry for entry in self._line if entry[2].id in self._ready]
            heapify(self._line)

    def head(self) -> Request | None:
        """First in rank of those in line."""
        line = self._line
        while line:
            request = line[0][2]
            if self._ready.get(request.id) is request:
                return request
            heappop(line)
        return None

    # -- asleep, held back ----------------------------------------------------------------------------------------

    def wake(self, request: Request) -> None:
        """Back into the line if it was asleep."""
        if self._asleep.pop(request.id, None) is not None:
            self._queue(request)

    def hold(self, request: Request, key: bytes | str) -> None:
        """Out of the line, until `release(key)`."""
        del self._ready[request.id]
        self.held.setdefault(key, []).append(request)

    def release(self, key: bytes | str) -> None:
        """What these waited for is there, or will not come: back into the line."""
        for request in self.held.pop(key, ()):
            if request.state is not State.FINISHED:
                self._queue(request)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def num_asleep(self) -> int:
        """Those who wait for credit."""
        return len(self._asleep)

    @property
    def is_awake(self) -> bool:
        """True if somebody is in line or held back."""
        return bool(self._ready or self.held)

    def check(self) -> set[str]:
        """Prove that everybody waits once, and return who waits. Raises AssertionError."""
        held = [r.id for group in self.held.values() for r in group if r.state is not State.FINISHED]
        everybody = {*self._ready, *self._asleep, *held}
        assert len(self._ready) + len(self._asleep) + len(held) == len(everybody) == self.num_requests, "a request waits twice"
        assert everybody or not self.num_tokens, "waiting tokens are miscounted"
        return everybody

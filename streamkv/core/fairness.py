"""Tenants of one priority level take turns by the tokens they have had.

The virtual token counter of "Fairness in Serving Large Language Models" (OSDI '24): every tenant has an account of the tokens
that were computed for it (prompt tokens that no cache had, and output tokens), and the one with the least goes first. Within a
tenant the order is that of arrival, so that with one tenant everything is.

    served    A 900   B 400   C 400       next: B or C, whoever has had no turn for longer

Who comes back to the line starts from the least of those who stand in it; if nobody does, from whoever was admitted last. So
having been away earns nothing, and whoever had more than that keeps the difference. Two tenants that always wait differ by no
more than the longest requests of either, however many of them one sends.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from streamkv.core.request import Account, Request

__all__ = ["Line"]

_FEW = 64
"""Dropped entries that are not worth clearing away."""


_Place = tuple[int, int, int]
"""(tokens served, last turn, arrival of the first request): the least is the next."""


class _Queue:
    """One tenant's requests that may be admitted now, in order of arrival."""

    __slots__ = ("account", "heap", "is_owing", "num_live", "place", "ready")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.num_live = 0  # requests without their last event, wherever they are
        self.ready: dict[str, Request] = {}
        self.heap: list[tuple[int, Request]] = []  # by arrival; who has left `ready` is dropped when he comes up
        self.place: _Place | None = None  # where it stands in the line, or further behind by now
        self.is_owing = False  # in the line's list of those who left with more than their share

    def push(self, request: Request) -> None:
        self.ready[request.id] = request
        heappush(self.heap, (request.arrival, request))
        if len(self.heap) > _FEW and len(self.heap) > 4 * len(self.ready):
            self.heap = [entry for entry in self.heap if entry[1].id in self.ready]
            heapify(self.heap)

    def place_of(self, first: Request) -> _Place:
        return (*self.account.standing, first.arrival)

    def first(self) -> Request | None:
        heap = self.heap
        while heap:
            request = heap[0][1]
            if self.ready.get(request.id) is request:
                return request
            heappop(heap)
        return None


class Line:
    """Everybody of one priority level who may be admitted now. O(log n) for each who comes, goes, or has been served since."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}  # of tenants with live requests, and of those that owe
        self._order: list[tuple[_Place, _Queue]] = []  # heap of places; outdated ones are put right when they come up
        self._owing: list[tuple[int, str]] = []  # heap
        self._last = Account("")  # of who was admitted last
        self.num_live = 0

    # -- tenants come and go --------------------------------------------------------------------------------------

    def join(self, tenant: str) -> Account:
        """One more live request of a tenant: the account that pays for it."""
        queue = self._queues.get(tenant)
        if queue is None:
            account = self._last if self._last.tenant == tenant else Account(tenant)
            queue = self._queues[tenant] = _Queue(account)
        queue.num_live += 1
        self.num_live += 1
        return queue.account

    def leave(self, tenant: str) -> None:
        """One less. The last one takes the account with it, unless the tenant has had more than it would come back to."""
        queue = self._queues[tenant]
        queue.num_live -= 1
        self.num_live -= 1
        if queue.num_live or queue.is_owing:
            return
        # Nobody will ever come back to less than both: those in line have more, and an empty line starts from the last.
        if queue.account.served <= min(self._least(), self._last.served):
            del self._queues[tenant]
        else:
            self._owe(queue)

    def _owe(self, queue: _Queue) -> None:
        queue.is_owing = True
        heappush(self._owing, (queue.account.served, queue.account.tenant))

    def _forgive(self, served: int) -> None:
        """Drop the accounts of those who have gone and no longer have more than anybody who waits."""
        while self._owing and self._owing[0][0] <= served:
            tenant = heappop(self._owing)[1]
            queue = self._queues[tenant]
            queue.is_owing = False
            if queue.num_live:
                continue  # it is here again
            if queue.account.served > served:
                self._owe(queue)  # it was
            else:
                del self._queues[tenant]

    # -- requests come and go -------------------------------------------------------------------------------------

    def push(self, request: Request) -> None:
        """Into the line; the tenant may have been away from it."""
        queue = self._queues[request.tenant]
        account = queue.account
        if not queue.ready:
            account.served = max(account.served, self._least())
        queue.push(request)
        first = queue.first()
        assert first is not None
        place = queue.place_of(first)
        if queue.place is None or place < queue.place:
            queue.place = place
            heappush(self._order, (place, queue))
            if len(self._order) > _FEW and len(self._order) > 4 * len(self._queues):
                self._tidy()

    def _tidy(self) -> None:
        """Do not let the places of those who have gone pile up."""
        self._order = [(queue.place, queue) for queue in self._queues.values() if queue.place is not None]
        heapify(self._order)

    def head(self) -> Request | None:
        """The first request of the tenant that has had least; among equals of the one that has had no turn for longest."""
        order = self._order
        while order:
            place, queue = order[0]
            first = queue.first()
            if place != queue.place:
                heappop(order)  # it stands elsewhere since
            elif first is None:
                queue.place = None
                heappop(order)
            elif place == (current := queue.place_of(first)):
                return first
            else:
                queue.place = current
                heapreplace(order, (current, queue))
        return None

    def remove(self, request: Request) -> None:
        """Out of the line, if it stands there."""
        self._queues[request.tenant].ready.pop(request.id, None)

    def take(self, request: Request) -> None:
        """Out of the line: it is admitted."""
        self.remove(request)
        self._last = request.account
        self._forgive(self._last.served)

    def _least(self) -> int:
        """What the tenant has had whose turn it is; if nobody is in line, who was admitted last."""
        head = self.head()
        return self._last.served if head is None else head.account.served

    # -- looking --------------------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """Who stands in line."""
        return [request_id for queue in self._queues.values() for request_id in queue.ready]

    def check(self) -> None:
        """Prove that no account is lost and none stays behind. Raises AssertionError."""
        assert self.num_live == sum(queue.num_live for queue in self._queues.values()), "live requests are miscounted"
        assert len(self._owing) == len({tenant for _, tenant in self._owing}), "a tenant owes twice"
        assert {tenant for _, tenant in self._owing} == {t for t, q in self._queues.items() if q.is_owing}, "a debt is lost"
        for tenant, queue in self._queues.items():
            assert queue.num_live or queue.is_owing, f"the account of {tenant!r} stays behind"
            if (first := queue.first()) is not None:
                assert queue.place is not None, f"{tenant!r} has no place"
                assert (queue.place, queue) in self._order, f"{tenant!r} waits in no line"
                assert queue.place <= queue.place_of(first), f"{tenant!r} stands behind its place"

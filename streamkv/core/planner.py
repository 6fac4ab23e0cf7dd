"""What goes into the next step: decodes, prompts in progress, room for them, and who is admitted. The policy is in `plan`."""

from __future__ import annotations

from collections.abc import Sequence

from streamkv.core.config import SchedulerConfig
from streamkv.core.request import Request, State
from streamkv.core.roster import Roster
from streamkv.core.step import PENDING, Step

__all__ = ["Planner"]


class Planner:
    """Fills one step after the other. Takes its decisions on what the roster says, and has them carried out there."""

    def __init__(self, config: SchedulerConfig, roster: Roster) -> None:
        self._budget = config.max_num_batched_tokens
        self._draft_rows = config.draft_rows
        self._roster = roster
        self._cache = roster.cache

    def plan(self, step: Step, only: frozenset[str] | None) -> list[Request]:
        """Fill an empty step.

        Args:
            only: advance just these running requests and admit nobody.

        Returns:
            The request of each row.
        """
        members: list[Request] = []
        chunks: list[Request] = []
        if only is None and len(self._roster.running) > self._roster.max_running:
            self._thin_out(step)
        may_admit = only is None and self._make_room(step)
        self._plan_decodes(step, members, chunks, only)
        chunks = _in_turn(chunks)
        for position, request in enumerate(chunks):
            if may_admit and self._is_overtaken(request):
                may_admit = self._admit(step, members, chunks[position:])
            self._plan_chunk(step, members, request)
        if may_admit:
            self._admit(step, members)
        return members

    def squeeze(self, max_tokens: int) -> None:
        """Steps have no more tokens than this from now on, and so no more requests."""
        self._budget = self._roster.max_running = max_tokens

    def _is_overtaken(self, request: Request) -> bool:
        """True if a waiting request of another tenant, whose turn it is, goes before this prompt in progress."""
        head = self._roster.waiting.head()
        return head is not None and head.tenant != request.tenant and _turn(head) <= _turn(request)

    # -- rows -----------------------------------------------------------------------------------------------------

    def _plan_decodes(self, step: Step, members: list[Request], chunks: list[Request], only: frozenset[str] | None) -> None:
        """One token for every running request that has exactly one to compute; the others go to `chunks`."""
        size, pool = self._cache.block_size, self._cache.pool
        rows, starts, counts, samples, tokens = step.rows, step.starts, step.counts, step.samples, step.tokens
        step_id = step.id
        for request in self._roster.running.values():
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
            tokens.append(known[planned] if planned < len(known) else PENDING)
            members.append(request)
            request.planned = planned + 1
            if request.lookup is not None and only is None:
                self._draft(step, request, length)
            counts.append(request.planned - planned)
            samples.append(request.planned - planned)
            request.pending += 1
            request.last_step = step_id

    def _draft(self, step: Step, request: Request, length: int) -> None:
        """Have the entry that is being planned check what may come after its token: as far as nobody else goes without."""
        pool, running = self._cache.pool, len(self._roster.running)
        end = len(request.blocks) + max(0, pool.num_available - 2 * running)  # blocks; as many are left as `_make_room` needs
        most = min(
            min(self._draft_rows, self._budget) - running - (step.num_tokens - len(step.rows)),
            end * self._cache.block_size - request.planned,
            request.limit - length - 1,
        )
        if request.credit is not None:
            most = min(most, request.credit - (length - request.num_prompt) - 1)
        assert request.lookup is not None
        drafts = request.lookup.propose(request.tokens, request.pending, most)
        if not drafts:
            return
        if request.planned + len(drafts) > len(request.blocks) * self._cache.block_size:
            self._grow(step, request, request.planned + len(drafts))
        step.tokens.extend(drafts)
        request.planned += len(drafts)
        self._roster.drafting = step.id

    def _plan_chunk(self, step: Step, members: list[Request], request: Request) -> None:
        """As much of a prompt (or of what was preempted) as budget and blocks allow."""
        length = len(request.tokens)
        count = min(length - request.planned, self._budget - step.num_tokens)
        while count > 0:
            missing = self._cache.missing(request, request.planned + count) - self._cache.pool.num_available
            if missing <= 0:
                break
            count -= max(1, (missing - 1) * self._cache.block_size)
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
        self._charge(request, step)

    def _charge(self, request: Request, step: Step) -> None:
        """Have the tenant pay for prompt tokens: once, however often they are computed, and not for what the cache had."""
        account, end = request.account, min(request.planned, request.num_prompt)
        if end > request.charged:
            account.served += end - request.charged
            request.charged = end
        account.last_turn = step.id

    def _grow(self, step: Step, request: Request, end: int) -> None:
        first, ids, copies = self._cache.grow(request, end)
        if ids:
            step.tables.append((request.row, first, ids))
            step.copies.extend(copies)

    # -- preemption -----------------------------------------------------------------------------------------------

    def _thin_out(self, step: Step) -> None:
        """Preempt until no more compute than may, the least worth first. Who is parked computes nothing."""
        guard, active = self._guard(), [r for r in self._roster.running.values() if not r.parked]
        others = sorted((r for r in active if r is not guard), key=self._worth)
        for victim in others[: max(0, len(active) - self._roster.max_running)]:
            self._roster.preempt(victim, step)

    def _make_room(self, step: Step) -> bool:
        """Preempt until the next token of everybody who runs fits, fenced blocks counted as coming.

        Returns:
            False if memory is short: then nobody is admitted.
        """
        cache, running = self._cache, self._roster.running
        available = cache.pool.num_available
        if available > 2 * len(running) or not running:
            # Nobody needs more than one new block and one copy; prompts in progress take what is there.
            return True
        guard = self._guard()
        demand = {request.id: self._demand(request, guard) for request in running.values()}
        needed = sum(demand.values())
        enough = needed <= available
        while needed > cache.pool.num_available + cache.num_fenced:
            victim = self._victim(guard)
            if victim is None:
                break  # only the guard is left; it fits, or it would have been refused
            needed -= demand[victim.id]
            self._roster.preempt(victim, step)
        return enough

    def _demand(self, request: Request, guard: Request | None) -> int:
        """Blocks without which the request cannot advance now. A prompt in progress may wait, unless it is the guard."""
        length = len(request.tokens) + request.pending
        if request.parked or length >= request.limit or (length - request.planned > 1 and request is not guard):
            return 0
        return self._cache.missing(request, request.planned + 1)

    def _guard(self) -> Request | None:
        """The running request that is never a victim: the first in rank that is not parked."""
        return min((r for r in self._roster.running.values() if not r.parked), key=lambda r: r.rank, default=None)

    def _victim(self, guard: Request | None) -> Request | None:
        """Parked ones first."""
        candidates = (r for r in self._roster.running.values() if r is not guard)
        return min(candidates, key=lambda r: (not r.parked, self._worth(r)), default=None)

    def _preempt_parked(self, step: Step) -> bool:
        """Take the blocks of one running request whose client does not read; False if there is none."""
        # Not of one that got its last accepted token planned a moment ago: its row is in this very step.
        parked = [r for r in self._roster.running.values() if r.parked and r.last_step < step.id]
        if not parked:
            return False
        self._roster.preempt(min(parked, key=self._worth), step)
        return True

    def _worth(self, request: Request) -> tuple[int, int, float, int]:
        """The least is preempted first: lowest priority, tenant that has had most, cheapest to bring back, youngest."""
        return (-request.priority, -request.account.served, self._cache.cost(request), -request.arrival)

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self, step: Step, members: list[Request], before: Sequence[Request] = ()) -> bool:
        """Admit whose turn it is, as long as row, budget and blocks are there.

        Args:
            before: prompts in progress that are still to be planned; their blocks are kept for them, and nobody goes before
                them whose turn is later.

        Returns:
            False if the head of the line cannot be admitted. Strict order: nobody overtakes it, so it cannot starve.
        """
        roster = self._roster
        reserve = sum(self._cache.missing(request, len(request.tokens)) for request in before)
        while roster.has_row and step.num_tokens < self._budget:
            request = roster.waiting.head()
            if request is None or (before and not self._is_overtaken(before[0])):
                return True
            if roster.in_flight(request):
                return False  # preempted while a step of it runs: that step must be committed first
            self._cache.extend_keys(request)
            key = self._awaits(request, step)
            if key is not None:
                roster.waiting.hold(request, key)
                continue
            if not (self._admit_fork(request, step) if request.leader else self._admit_one(request, step, reserve)):
                return False
            self._plan_chunk(step, members, request)
        return True

    def _awaits(self, request: Request, step: Step) -> bytes | str | None:
        """What the request should wait for, because somebody else is computing it: a digest, or a leader's prompt."""
        leader = request.leader
        if leader is not None:
            if leader.state is State.RUNNING or (leader.state is State.WAITING and not leader.parked):
                # What a fork shares beyond the leader's prompt may be still to come, but a parked leader never gets on.
                needed = min(request.shared, len(request.tokens) - 1, leader.num_prompt - 1)
                # A leader that enters with this very step may get its prompt by a copy of this step: too early to share.
                ready = leader.computed >= needed and -1 < leader.entered < step.id
                return None if ready else leader.id
            request.leader = None
        return self._written_by_others(request) if self._roster.writing else None

    def _written_by_others(self, request: Request) -> bytes | None:
        """Digest of the last of the consecutive blocks after the request's hit that a running request is writing."""
        found_here = self._cache.lookup(request)
        hit = len(found_here.blocks) + len(found_here.slots)
        last = (len(request.tokens) - 1) // self._cache.block_size
        found: bytes | None = None
        for digest, _ in request.keys[hit:last]:
            if digest not in self._roster.writing:
                break
            found = digest
        return found

    def _admit_one(self, request: Request, step: Step, reserve: int) -> bool:
        cache, running = self._cache, self._roster.running
        hit = cache.lookup(request)
        # And one block for every running request: who is admitted should not be preempted right after.
        while (needed := cache.blocks_to_admit(request, hit) + reserve + len(running)) > cache.pool.num_available:
            if not running and not cache.num_fenced:
                break
            if needed <= cache.pool.num_available + cache.num_fenced or not self._preempt_parked(step):
                return False
            hit = cache.lookup(request)
        copies = cache.admit(request, hit)
        self._roster.enter(request, step, copies)
        for digest, _ in request.keys[len(hit.blocks) :]:
            self._roster.writing.setdefault(digest, request)
        return True

    def _admit_fork(self, request: Request, step: Step) -> bool:
        """Share the leader's blocks; the copy of the shared tail is made by the chunk that follows at once."""
        cache, leader = self._cache, request.leader
        assert leader is not None
        if cache.pool.num_available < 1:
            if not cache.num_fenced:
                self._preempt_parked(step)
            if leader.state is not State.RUNNING or cache.pool.num_available < 1:
                return False  # the leader itself was parked and lost its blocks, or they are fenced: next plan
        request.leader = None
        cache.fork(leader, request)
        self._roster.enter(request, step, [])
        return True


def _turn(request: Request) -> tuple[int, int, int]:
    """The least is computed first."""
    return (request.priority, *request.account.standing)


def _in_turn(chunks: list[Request]) -> list[Request]:
    """Prompts in progress as their tenants take turns; of one tenant in the order of admission."""
    if len(chunks) > 1 and any(request.tenant != chunks[0].tenant for request in chunks):
        return sorted(chunks, key=_turn)
    return chunks

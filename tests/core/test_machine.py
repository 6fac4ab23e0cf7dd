"""Everything at once: requests, steps, look-ahead, cancels, credit, crashes and NaN, against outputs computed without a cache.

`SlotMemory` reads every slot through the block table, so wrong sharing, an early reuse or a missing copy shows at once.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamkv.errors import StreamKVError
from tests.core.model import VOCAB, World

PREFIXES = [[], [1, 2, 3], [1, 2, 3, 4, 5, 6, 0, 1], [1, 2, 3, 4, 5, 6, 0, 2, 2, 2, 2], [6] * 17]


class SchedulerMachine(RuleBasedStateMachine):
    """What a server may do to a scheduler, in any order."""

    @initialize(
        num_blocks=st.integers(4, 20),
        block_size=st.sampled_from([1, 2, 4, 5]),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from([1, 4, 9, 32]),
        policy=st.sampled_from(["fcfs", "priority"]),
        digest_size=st.sampled_from([1, 32]),
        caching=st.sampled_from([True, True, True, False]),
        draft_rows=st.sampled_from([0, 3, 32]),
        num_host_slots=st.sampled_from([0, 0, 1, 5, 40]),
        swap_block_tokens=st.sampled_from([0.0, 0.0, 1.5]),
    )
    def start(self, **options: object) -> None:
        self.world = World(**options)  # type: ignore[arg-type]  # drawn by name
        self.next = 0

    def live(self) -> list[str]:
        return self.world.scheduler.live_ids()

    @rule(
        prefix=st.sampled_from(PREFIXES),
        own=st.lists(st.integers(0, VOCAB - 1), max_size=6),
        max_tokens=st.integers(0, 9),
        min_tokens=st.sampled_from([0, 0, 2]),
        n=st.sampled_from([1, 1, 2, 3]),
        stop=st.sampled_from([frozenset(), frozenset({3})]),
        credit=st.sampled_from([None, None, None, 0, 2]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "other"]),
        tenant=st.sampled_from(["", "", "b", "c"]),
        use_cache=st.sampled_from([True, True, False]),
        speculate=st.booleans(),
        patience=st.sampled_from([None, None, 0, 1, 4]),
    )
    def submit(self, prefix: list[int], own: list[int], max_tokens: int, n: int, patience: int | None, **options: object) -> None:
        options["stop_token_ids"] = options.pop("stop")
        options["deadline"] = None if patience is None else self.world.now + patience
        try:
            self.world.submit(f"r{self.next}", prefix + own, max_tokens, n=n, **options)
        except StreamKVError:
            return  # refused before anything is queued; `check` would see a trace of it
        self.next += 1

    @precondition(lambda self: self.live())
    @rule(
        data=st.data(),
        keep=st.integers(0, 30),
        own=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        max_tokens=st.integers(0, 6),
        n=st.sampled_from([1, 1, 2]),
        salt=st.sampled_from(["", "", "", "other"]),
        credit=st.sampled_from([None, None, 0, 2]),
        tenant=st.sampled_from(["", "b"]),
    )
    def fork(self, data: st.DataObject, keep: int, own: list[int], max_tokens: int, n: int, **options: object) -> None:
        """A new request that begins as a live one does, up to some token of its output, and goes on by itself."""
        parent = data.draw(st.sampled_from(self.live()))
        tokens, num_prompt = self.world.scheduler.tokens_of(parent)
        prompt = tokens[: num_prompt + keep] + own
        try:
            self.world.submit(f"r{self.next}", prompt, max_tokens, n=n, fork_of=parent, **options)
        except StreamKVError:
            return
        self.next += 1

    @precondition(lambda self: len(self.world.flight) < 2)
    @rule()
    def plan(self) -> None:
        self.world.plan()

    @precondition(lambda self: len(self.world.flight) < 2 and self.live())
    @rule(data=st.data())
    def plan_a_step_that_gives_nan(self, data: st.DataObject) -> None:
        self.world.plan(fail=frozenset({data.draw(st.sampled_from(self.live()))}))

    @precondition(lambda self: self.world.flight)
    @rule()
    def commit(self) -> None:
        self.world.commit()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(self.live())))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), limit=st.integers(0, 9))
    def credit(self, data: st.DataObject, limit: int) -> None:
        self.world.scheduler.credit(data.draw(st.sampled_from(self.live())), limit)

    @rule(ran=st.booleans(), ahead=st.booleans(), data=st.data())
    def crash_and_try_some_again(self, ran: bool, ahead: bool, data: st.DataObject) -> None:
        suspects = self.world.crash(ran=ran, ahead=ahead)
        self.world.check()
        if suspects:
            some = data.draw(st.lists(st.sampled_from(suspects), min_size=1, unique=True))
            self.world.plan(only=frozenset(some))
            self.world.commit_all()

    @rule(data=st.data())
    def memory_is_short_or_is_not_any_more(self, data: st.DataObject) -> None:
        self.world.squeeze(data.draw(st.integers(1, self.world.scheduler.config.max_num_batched_tokens)))

    @rule()
    def evict_everything(self) -> None:
        self.world.commit_all()
        self.world.scheduler.cache.pool.reset()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.world.verify()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for request_id in self.live():
            self.world.scheduler.credit(request_id, 10_000)
        self.world.run()
        self.world.verify()
        assert set(self.world.reason) == set(self.world.asked), "a request never ended"
        assert not self.world.scheduler.has_requests


class CrowdedMachine(SchedulerMachine):
    """Few blocks for many, and a host that keeps what they lose."""

    @initialize(
        num_blocks=st.integers(6, 9),
        block_size=st.sampled_from([2, 4]),
        max_num_seqs=st.integers(3, 5),
        budget=st.sampled_from([4, 9, 32]),
        caching=st.booleans(),
        draft_rows=st.sampled_from([0, 32]),
        num_host_slots=st.sampled_from([3, 40]),
        swap_block_tokens=st.sampled_from([0.0, 1.0]),
    )
    def start(self, **options: object) -> None:
        super().start(**options)


SchedulerMachine.TestCase.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
CrowdedMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCrowdedMachine = CrowdedMachine.TestCase

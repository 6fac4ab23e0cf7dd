"""Tenants take turns: what one gets beside another that sends ten times as much, and the line against an oracle that searches."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamkv.core.fairness import Line
from streamkv.core.request import Account, Request, StopRule
from streamkv.core.step import Step
from tests.core.model import VOCAB, World
from tests.core.test_scheduler import planned, preempted, rows_of


def prompt(seed: int, length: int) -> list[int]:
    """Tokens that seldom begin like another prompt's."""
    return random.Random(seed).choices(range(VOCAB), k=length)


def tenant_of(name: str) -> str:
    return name.partition(".")[0]


class Town(World):
    """Requests are named `tenant.number`; counts the tokens that steps compute for each tenant."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"num_blocks": 256, "max_num_seqs": 4, "budget": 16, "max_queued_requests": 10_000} | options)  # type: ignore[arg-type]  # by name
        self.computed: Counter[str] = Counter()
        self.numbers = count()
        self.admitted: list[str] = []

    def ask(self, tenant: str, length: int = 9, max_tokens: int = 4, **options: object) -> str:
        number = next(self.numbers)
        name = f"{tenant}.{number}"
        self.submit(name, prompt(number, length), max_tokens, tenant=tenant, salt=tenant, **options)
        return name

    def plan(self, **options: object) -> Step | None:  # type: ignore[override]  # passed through
        step = super().plan(**options)  # type: ignore[arg-type]  # passed through
        if step is not None:
            self.admitted += [name for _, name in step.admitted]
            for name, (_, tokens) in rows_of(self, step).items():
                self.computed[tenant_of(name)] += tokens
        return step

    def waiting(self, tenant: str) -> int:
        return sum(tenant_of(name) == tenant for line in self.lines.values() for name in line.ids())

    @property
    def lines(self) -> dict[int, Line]:
        return self.scheduler._roster.waiting._lines


# -- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [((9, 4), (9, 4)), ((40, 1), (5, 9)), ((3, 9), (30, 2)), ((50, 8), (50, 8))], ids=str)
def test_who_sends_a_tenth_gets_half_as_long_as_both_wait(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (a_prompt, a_output), (b_prompt, b_output) = sizes
    town = Town(max_model_len=128)
    for _ in range(40):
        for _ in range(10):
            town.ask("A", a_prompt, a_output)
        town.ask("B", b_prompt, b_output)
    while town.waiting("A") and town.waiting("B"):
        town.run_once()
    share = town.computed["B"] / town.computed.total()
    assert 0.45 <= share <= 0.55, town.computed
    town.check()


def test_the_difference_between_two_who_always_wait_has_a_bound() -> None:
    """Twice the tokens of all requests that fit into a step at once (theorem 4.4 of the paper, with weights of one)."""
    town = Town()
    for _ in range(200):
        town.ask("A", 20, 6)
        town.ask("B", 5, 3)
    worst = 0
    while town.waiting("A") and town.waiting("B"):
        town.run_once()
        worst = max(worst, abs(town.computed["A"] - town.computed["B"]))
    assert 0 < worst <= 2 * 4 * 26


def test_many_tenants_share_alike() -> None:
    town = Town()
    tenants = [f"T{index}" for index in range(10)]
    for index, tenant in enumerate(tenants):
        for _ in range(10 * (index + 1)):
            town.ask(tenant)
    while all(town.waiting(tenant) for tenant in tenants):
        town.run_once()
    assert max(town.computed.values()) - min(town.computed.values()) <= 2 * 13


def test_what_the_cache_had_is_not_paid_for_and_recomputation_is_not_either() -> None:
    town = Town(num_blocks=10, max_num_seqs=3)
    town.submit("A.first", [1] * 12, 1, tenant="A")
    town.run()
    town.submit("A.same", [1] * 12, 12, tenant="A")
    town.submit("A.more", [2] * 8, 12, tenant="A")
    town.submit("A.most", [3] * 8, 12, tenant="A")
    account = town.scheduler._roster.live["A.same"].account
    town.run()
    assert preempted(town), "something was computed twice"
    assert account.served == (12 - 11) + 8 + 8 + 3 * 12
    town.verify()


# -- away and back ----------------------------------------------------------------------------------------------------


def test_having_been_away_earns_nothing() -> None:
    town = Town()
    for _ in range(100):
        town.ask("A")
    for _ in range(60):
        town.run_once()
    before = town.computed["A"]
    assert before > 500
    for _ in range(100):
        town.ask("B")
    for _ in range(60):
        town.run_once()
    assert town.computed["A"] - before >= 0.45 * (town.computed.total() - before), "the newcomer was let catch up"


def test_nor_does_it_while_nobody_waits() -> None:
    """One tenant alone decodes for long; when another comes and both have more than there is room for, they share."""
    town = Town(max_model_len=512)
    for _ in range(3):
        town.ask("A", 5, 300)
    for _ in range(250):
        town.run_once()
    for _ in range(60):
        town.ask("B")
        town.ask("A")
    before = Counter(town.computed)
    while town.waiting("A") and town.waiting("B"):
        town.run_once()
    gained = town.computed - before
    # Those that run on are A's as well: what they get meanwhile is not more than B's turns make good.
    assert 0.45 <= gained["B"] / gained.total() <= 0.55


def test_who_left_with_more_than_the_others_does_not_start_again_from_nothing() -> None:
    """One long prompt at a time, each sent when the last has ended, against many short ones: still half."""
    town = Town(max_num_seqs=2, max_model_len=256)
    for _ in range(400):
        town.ask("B", 5, 3)
    name = town.ask("A", 200, 1)
    for _ in range(400):
        town.run_once()
        if name in town.reason:
            name = town.ask("A", 200, 1)
    assert town.waiting("B")
    assert 0.4 <= town.computed["A"] / town.computed.total() <= 0.6


def test_nobody_who_has_gone_is_remembered() -> None:
    town = Town()
    for index in range(50):
        town.ask(f"T{index}", 3 + index % 20)
    town.run()
    assert not town.lines
    # One that stays does not keep the others either: their accounts go once everybody has had as much.
    for index in range(300):
        town.ask("stays")
        town.ask(f"T{index}", 3 + index % 20)
        town.run_once()
    for name in town.scheduler.live_ids():
        if tenant_of(name) != "stays":
            town.cancel(name)
    town.ask("stays")
    for _ in range(60):
        town.run_once()
        town.check()
    assert town.waiting("stays")
    assert len(town.lines[0]._queues) <= 3


def test_who_comes_and_cancels_for_ever_leaves_nothing_behind() -> None:
    town = Town(max_num_seqs=1)
    town.ask("A", 5, 50)
    town.run_once()
    town.ask("A")
    for index in range(1000):
        town.cancel(town.ask(f"T{index % 7}"))
    town.check()
    line = town.lines[0]
    assert set(line._queues) == {"A"}
    assert len(line._order) <= 70


# -- order ------------------------------------------------------------------------------------------------------------


def test_with_one_tenant_the_order_is_that_of_priority_and_arrival() -> None:
    source = random.Random(1)
    town = Town(policy="priority")
    rank = {}
    for number in range(100):
        priority = source.randint(-2, 2)
        rank[town.ask("A", source.randint(1, 30), source.randint(1, 6), priority=priority)] = (priority, number)
    town.run()
    assert town.admitted == sorted(rank, key=lambda name: rank[name])


def test_with_one_tenant_prompts_in_progress_go_on_before_anybody_is_admitted() -> None:
    town = Town(policy="priority", budget=8)
    first = town.ask("A", 20, priority=1)
    town.run_once()
    urgent = town.ask("A", 5, priority=-1)
    assert rows_of(town, planned(town)) == {first: (8, 8)}
    town.commit_all()
    assert rows_of(town, planned(town)) == {first: (16, 4), urgent: (0, 4)}


def test_a_prompt_in_progress_does_not_keep_another_tenant_out() -> None:
    town = Town(budget=8)
    long = town.ask("A", 40)
    town.ask("A", 40)
    town.run_once()
    short = town.ask("B", 5, 1)
    assert rows_of(town, planned(town)) == {short: (0, 5), long: (8, 3)}
    town.run()
    town.verify()


def test_prompts_in_progress_of_two_tenants_take_turns() -> None:
    town = Town(budget=8)
    for tenant in ("A", "B"):
        town.ask(tenant, 24, 1)
        town.run_once()
    town.run()
    assert [tenant_of(*rows_of(town, step)) for step in town.steps] == ["A", "B"] * 3


def test_a_higher_priority_goes_before_whoever_has_had_less() -> None:
    town = Town(policy="priority", max_num_seqs=1)
    town.ask("A", priority=-1)
    town.run()
    town.ask("B", priority=1)
    town.ask("A", priority=-1)
    town.run()
    assert [tenant_of(name) for name in town.admitted] == ["A", "A", "B"]


def test_nobody_overtakes_the_head_of_another_tenant() -> None:
    town = Town(num_blocks=6, max_num_seqs=3, budget=32)
    running = town.ask("A", 12, 9)
    town.run_once()
    large = town.ask("B", 12, 2)
    for _ in range(5):
        town.ask("A", 1, 1)
    while large not in town.admitted:
        town.run_once()
        assert town.admitted[:2] in ([running], [running, large]), "a small one fits, and must wait all the same"
    town.run()
    town.verify()


def test_who_overtakes_a_prompt_in_progress_leaves_it_the_blocks_for_its_rest() -> None:
    town = Town(num_blocks=10, block_size=4, budget=8)
    first = town.ask("A", 32, 1)
    town.run_once()
    second = town.ask("B", 16, 1)
    assert rows_of(town, planned(town)) == {first: (8, 8)}, "eight blocks are free, and six of them are spoken for"
    town.run()
    town.verify()
    assert not preempted(town)
    assert town.admitted == [first, second]


def test_the_tenant_that_has_had_most_loses_its_blocks_first() -> None:
    town = Town(num_blocks=8, block_size=4, max_num_seqs=3)
    town.submit("A.0", [1, 2, 3, 1], 12, tenant="A")  # first in rank: never a victim
    town.submit("A.1", [4] * 7, 12, tenant="A")
    town.submit("B.0", [3, 2, 3, 1], 12, tenant="B")
    while not preempted(town):
        town.run_once()
        town.take(town.scheduler.take_events())
    assert preempted(town)[0] == "A.1", "B's would cost less to compute again"
    town.run()
    town.verify()


# -- the cache --------------------------------------------------------------------------------------------------------


def first_tokens(flooded: bool, suffix: int) -> tuple[list[int], list[int]]:
    """Steps, and tokens computed, from each of a tenant's requests to its first token; its prompts begin alike."""
    town = Town(num_blocks=96, block_size=4, budget=32, max_num_seqs=4, max_model_len=128)
    prefix = prompt(0, 48)
    steps, tokens = [], []
    for number in range(40):
        for _ in range(24):  # three times the pool passes by
            while flooded and town.waiting("flood") < 5:
                town.ask("flood", 100, 1)
            town.run_once()
        name = f"victim.{number}"
        town.submit(name, prefix + prompt(1000 + number, suffix), 2, tenant="victim", salt="victim")
        before = len(town.steps), town.memory.computed_tokens
        while not town.output[name]:
            while flooded and town.waiting("flood") < 5:
                town.ask("flood", 100, 1)
            town.run_once()
        steps.append(len(town.steps) - before[0])
        tokens.append(town.memory.computed_tokens - before[1])
    town.verify()
    return steps, tokens


@pytest.mark.parametrize("suffix", [24, 32])
def test_a_flood_of_long_prompts_does_not_raise_anothers_time_to_the_first_token(suffix: int) -> None:
    """The prompts' new part fits into a step; time is measured in steps, and in tokens that are computed meanwhile."""
    for alone, flooded in zip(first_tokens(False, suffix), first_tokens(True, suffix), strict=True):
        assert sorted(flooded)[36] <= 1.5 * sorted(alone)[36], "90th percentile"


# -- the line, against an oracle --------------------------------------------------------------------------------------


class LineMachine(RuleBasedStateMachine):
    """Requests come, wait elsewhere, come back, are admitted, are charged and end; the oracle searches all for the least."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()
        self.numbers = count()
        self.live: dict[str, Request] = {}
        self.inside: dict[str, Request] = {}
        self.served: dict[str, int] = {}  # of every tenant that was ever seen
        self.last_turn: dict[str, int] = {}
        self.last: str | None = None

    def least(self) -> int:
        """What somebody who comes back starts from."""
        tenant = self.expected().tenant if self.inside else self.last
        return 0 if tenant is None else self.served[tenant]

    def expected(self) -> Request:
        return min(self.inside.values(), key=lambda r: (self.served[r.tenant], self.last_turn[r.tenant], r.arrival))

    def push(self, request: Request) -> None:
        if not any(other.tenant == request.tenant for other in self.inside.values()):
            # What has been dropped must not have mattered: the oracle never drops anything.
            self.served[request.tenant] = max(self.served[request.tenant], self.least())
        self.inside[request.id] = request
        self.line.push(request)

    @rule(tenant=st.sampled_from("ABCD"))
    def come(self, tenant: str) -> None:
        number = next(self.numbers)
        request = Request(f"r{number}", [1], StopRule(1), arrival=number, tenant=tenant)
        request.account = self.line.join(tenant)
        self.served.setdefault(tenant, 0)
        if not any(other.tenant == tenant for other in self.live.values()) and isinstance(request.account, Account):
            self.last_turn[tenant] = request.account.last_turn  # forgotten with the account, which is no loss
        self.live[request.id] = request
        self.push(request)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def step_out(self, data: st.DataObject) -> None:
        """It is held back."""
        request = self.inside.pop(data.draw(st.sampled_from(sorted(self.inside))))
        self.line.remove(request)

    @precondition(lambda self: len(self.live) > len(self.inside))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """Held back no longer, awake, or preempted."""
        self.push(self.live[data.draw(st.sampled_from(sorted(set(self.live) - set(self.inside))))])

    @precondition(lambda self: self.inside)
    @rule(tokens=st.integers(0, 5))
    def admit(self, tokens: int) -> None:
        head = self.line.head()
        assert head is self.expected()
        del self.inside[head.id]
        self.line.take(head)
        self.last = head.tenant
        self.charge(head.id, tokens, turn=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.integers(1, 5), turn=st.booleans())
    def pay(self, data: st.DataObject, tokens: int, turn: bool) -> None:
        self.charge(data.draw(st.sampled_from(sorted(self.live))), tokens, turn)

    def charge(self, name: str, tokens: int, turn: bool) -> None:
        request = self.live[name]
        self.served[request.tenant] += tokens
        request.account.served += tokens
        if turn:
            self.last_turn[request.tenant] = request.account.last_turn = next(self.numbers)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.inside.pop(request.id, None)
        self.line.remove(request)
        self.line.leave(request.tenant)
        if not self.live:  # the scheduler drops the line
            self.line, self.served, self.last_turn, self.last = Line(), {}, {}, None

    @invariant()
    def agrees(self) -> None:
        self.line.check()
        assert sorted(self.line.ids()) == sorted(self.inside)
        assert self.line.head() is (self.expected() if self.inside else None)
        for request in self.live.values():
            assert request.account.served == self.served[request.tenant]


LineMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestLineAgainstOracle = LineMachine.TestCase

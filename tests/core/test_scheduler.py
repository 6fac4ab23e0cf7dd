"""The scheduler's policy, one sentence a test."""

from __future__ import annotations

import pytest

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.request import StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import PENDING, Sampled, Step
from streamkv.errors import ContextLengthError, InvalidRequestError, KVCapacityError, OverloadedError, StreamKVError
from tests.core.model import VOCAB, World


def planned(world: World) -> Step:
    step = world.plan()
    assert step is not None
    return step


def rows_of(world: World, step: Step) -> dict[str, tuple[int, int]]:
    """Request -> (start, count)."""
    names = (world.memory.names[row] for row in step.rows)
    return {name: (start, count) for name, start, count in zip(names, step.starts, step.counts, strict=True)}


@pytest.mark.smoke
def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    world = World(budget=8)
    world.submit("r", list(range(6)) * 3, 3)
    seen = []
    while (step := world.plan()) is not None:
        seen.append((rows_of(world, step)["r"], step.samples))
        world.commit()
    assert seen == [((0, 8), [False]), ((8, 8), [False]), ((16, 2), [True]), ((18, 1), [True]), ((19, 1), [True])]
    world.verify()
    assert world.reason == {"r": "length"}


def test_decodes_come_first_and_prompts_share_what_is_left_of_the_budget() -> None:
    world = World(budget=8)
    world.submit("decoding", [1, 2], 9)
    world.run_once()
    world.submit("prompt", [3] * 12)
    step = planned(world)
    assert rows_of(world, step) == {"decoding": (2, 1), "prompt": (0, 7)}
    assert step.num_tokens == 8


def test_a_step_is_planned_ahead_with_a_pending_token() -> None:
    world = World()
    world.submit("r", [1, 2, 3], 5)
    planned(world)
    ahead = planned(world)
    assert ahead.tokens == [PENDING]
    assert ahead.starts == [3]
    world.run()
    world.verify()


def test_no_step_is_planned_behind_the_last_token() -> None:
    world = World()
    world.submit("r", [1, 2, 3], 1)
    planned(world)
    assert world.plan() is None
    world.commit()
    assert world.reason == {"r": "length"}


def test_a_row_planned_past_a_stop_token_is_dropped() -> None:
    world = World()
    world.submit("r", [1, 2, 3], 20, stop_token_ids=frozenset(range(7)))
    planned(world)
    planned(world)
    world.commit()
    assert world.reason == {"r": "stop"}
    assert len(world.output["r"]) == 1
    assert world.scheduler.cache.pool.num_used > 0, "fenced: the step in flight still writes"
    world.commit()
    assert world.scheduler.cache.pool.num_used == 0
    world.check()


def test_parallel_samples_compute_the_prompt_once() -> None:
    world = World()
    world.submit("r", [1, 2, 3, 4, 5, 6], 3, n=3)
    world.run()
    world.verify()
    # Six tokens once; each further sample recomputes the last one; two of three sampled tokens are fed back.
    assert world.memory.computed_tokens == 6 + 2 + 3 * 2


def test_siblings_of_an_uncached_prefix_wait_until_it_is_written() -> None:
    world = World(num_blocks=32, budget=32)
    prefix = [1, 2, 3, 4, 5, 6, 0, 1]
    for index in range(3):
        world.submit(f"r{index}", [*prefix, index], 2)
    assert list(rows_of(world, planned(world))) == ["r0"]
    world.commit()
    assert rows_of(world, planned(world)) == {"r0": (9, 1), "r1": (8, 1), "r2": (8, 1)}
    world.run()
    world.verify()
    assert [event.cached for event in world.events if event.state == "prefill"] == [0, 8, 8]


def test_a_held_sibling_goes_on_alone_when_the_writer_is_cancelled() -> None:
    world = World(num_blocks=32, budget=32)
    for name in ("writer", "held"):
        world.submit(name, [1, 2, 3, 4, 5, 6, 0, 1, 2], 2)
    assert list(rows_of(world, planned(world))) == ["writer"]
    world.cancel("writer")
    world.run()
    assert world.reason == {"writer": "cancelled", "held": "length"}
    world.verify()


def test_cached_prefix_is_shared_between_requests_and_counted() -> None:
    world = World()
    world.submit("first", [1, 2, 3, 4, 5, 6, 0, 1, 2], 2)
    world.run()
    world.submit("second", [1, 2, 3, 4, 5, 6, 0, 1, 3], 2)
    step = planned(world)
    assert rows_of(world, step) == {"second": (8, 1)}
    world.run()
    stats = world.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (18, 8, 4)


def test_priority_goes_first_under_priority_and_means_nothing_under_fcfs() -> None:
    for policy, first in (("priority", "urgent"), ("fcfs", "normal")):
        world = World(policy=policy, max_num_seqs=1, budget=4)
        world.submit("normal", [1], 1, priority=0)
        world.submit("urgent", [2], 1, priority=-1)
        assert list(rows_of(world, planned(world))) == [first]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    world = World(num_blocks=6, block_size=4, max_num_seqs=3, budget=32)
    world.submit("running", [1] * 12, 9)
    world.run_once()
    world.submit("large", [2] * 12, 2)
    world.submit("small", [3], 2)
    world.run_once()
    assert world.scheduler.stats().waiting == 2, "the small one fits and must wait all the same"
    world.run()
    world.verify()


def preempted(world: World) -> list[str]:
    return [event.id for event in world.events if event.state == "preempted"]


def crowd(world: World, names: list[str], **options: object) -> None:
    """Each with a prompt of its own and outputs long enough to fill the pool."""
    for index, name in enumerate(names):
        world.submit(name, [index, index + 1, index, index], 12, **options)


def test_memory_that_runs_out_preempts_and_everybody_finishes() -> None:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
    crowd(world, ["a", "b", "c"])
    world.run()
    world.verify()
    assert preempted(world), "the pool was too small for three"
    assert "a" not in preempted(world), "the first in rank is never a victim"
    assert world.scheduler.stats().preemptions == len(preempted(world))


def test_the_lowest_priority_is_preempted_first() -> None:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16, policy="priority")
    world.submit("low", [1, 2, 3, 1], 12, priority=1)
    world.submit("mid", [2, 2, 3, 1], 12, priority=0)
    world.submit("high", [3, 2, 3, 1], 12, priority=-1)
    world.run()
    world.verify()
    assert preempted(world)[0] == "low"
    assert "high" not in preempted(world)


def test_the_least_to_recompute_is_preempted_among_equals() -> None:
    world = World(num_blocks=9, block_size=4, max_num_seqs=3, budget=16)
    world.submit("first", [1, 2, 3, 1], 12)
    world.submit("long", [2] * 9, 12)
    world.submit("short", [3, 2, 3, 1], 12)
    world.run()
    world.verify()
    assert preempted(world)[0] == "short"


def test_the_first_in_rank_is_never_a_victim_even_if_it_is_the_cheapest() -> None:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
    world.submit("first", [1], 16)
    world.submit("long", [2] * 9, 12)
    world.submit("longer", [3] * 10, 12)
    world.run()
    world.verify()
    assert preempted(world)
    assert "first" not in preempted(world)


def test_a_parked_stream_is_preempted_before_anybody_else_however_much_it_costs() -> None:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
    world.submit("parked", [1, 2, 3, 1, 5, 5, 5, 5, 5], 12, credit=3)
    crowd(world, ["b", "c"])
    world.run()
    assert preempted(world)[0] == "parked"
    assert "parked" not in world.reason
    assert len(world.output["parked"]) == 3
    world.scheduler.credit("parked", 100)
    world.run()
    world.verify()
    assert world.reason["parked"] == "length"


def test_credit_stops_and_wakes_a_request_exactly_at_the_limit() -> None:
    world = World()
    world.submit("r", [1, 2, 3], 6, credit=0)
    world.run()
    assert world.output["r"] == []
    for limit in (2, 1, 5):
        world.scheduler.credit("r", limit)
        world.run()
        assert len(world.output["r"]) == max(2, limit), "credit is absolute and never sinks"
    world.scheduler.credit("r", 6)
    world.run()
    assert world.reason == {"r": "length"}


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (InvalidRequestError, "distinct", ((), [1], 1)),
        (InvalidRequestError, "distinct", (("a", "a"), [1], 1)),
        (InvalidRequestError, "in use", (("live",), [1], 1)),
        (InvalidRequestError, "empty", (("a",), [], 1)),
        (InvalidRequestError, "max_tokens", (("a",), [1], -1)),
        (ContextLengthError, "65, more than the context of 64", (("a",), [1] * 60, 5)),
        (KVCapacityError, "10 KV blocks and the server has 9", (("a",), [1] * 37, 2)),
        (KVCapacityError, "10 KV blocks and the server has 9", (("a",), [1] * 37, 0)),
        (OverloadedError, "waiting already", (("a", "b", "c", "d", "e"), [1], 1)),
    ],
    ids=lambda value: None,
)
def test_what_can_never_fit_is_refused_before_it_is_queued(error: type[StreamKVError], match: str, arguments: tuple) -> None:
    world = World(num_blocks=9, max_queued_requests=5)
    world.submit("live", [1], 1)
    ids, prompt, max_tokens = arguments
    with pytest.raises(error, match=match):
        world.scheduler.submit(ids, prompt, StopRule(max_tokens))
    assert world.scheduler.live_ids() == ["live"]
    world.check()
    world.run()


def test_a_request_as_large_as_the_pool_runs() -> None:
    world = World(num_blocks=9)
    world.submit("r", [1] * 35, 2)
    world.run()
    world.verify()
    assert world.reason == {"r": "length"}


def test_a_request_that_generates_nothing_ends_when_its_prompt_is_computed() -> None:
    world = World(num_blocks=9, budget=16)
    world.submit("r", [1, 2, 3] * 12, 0)  # 36 tokens: the whole pool, three chunks
    world.run()
    world.verify()
    assert (world.output["r"], world.reason) == ([], {"r": "length"})
    assert sum(sum(step.counts) for step in world.steps) == 36
    assert [event.state for event in world.events] == ["prefill", None], "it never decodes"
    assert world.scheduler.stats().output_tokens == 0


def test_samples_that_generate_nothing_share_the_prompt() -> None:
    world = World()
    world.submit("r", [1, 2, 3, 4, 5, 6], 0, n=3)
    world.run()
    assert world.reason == dict.fromkeys(("r/0", "r/1", "r/2"), "length")


def test_no_stop_token_ends_a_request_before_its_min_tokens() -> None:
    for least in range(9):
        world = World()
        world.submit("r", [1], 8, stop_token_ids=frozenset(range(VOCAB)), min_tokens=least)
        world.run()
        world.verify()
        assert (len(world.output["r"]), world.reason["r"]) == ((least + 1, "stop") if least < 8 else (8, "length"))


def test_what_a_runner_says_of_a_chunk_that_samples_nothing_is_handed_through() -> None:
    world = World(budget=4)
    world.submit("r", [1, 2, 3, 4, 5, 6], 1)
    step = world.scheduler.plan(1.0)
    assert step is not None
    events = world.scheduler.commit(step, Sampled([()], extras={0: "of the chunk"}))
    assert [(event.state, event.extra) for event in events] == [("prefill", None), (None, "of the chunk")]
    step = world.scheduler.plan(2.0)
    assert step is not None
    (event,) = world.scheduler.commit(step, Sampled([(5,)], extras={0: "of the token"}))
    assert (event.tokens, event.extra, event.finish_reason) == ((5,), "of the token", "length")


def test_waiting_prompt_tokens_are_bounded_but_one_request_always_gets_in() -> None:
    scheduler = Scheduler(SchedulerConfig(max_queued_tokens=10), KVCache(64, 4))
    scheduler.submit(("large",), [1] * 20, StopRule(1))
    with pytest.raises(OverloadedError, match="20 prompt tokens"):
        scheduler.submit(("more",), [1], StopRule(1))
    scheduler.cancel("large")
    scheduler.submit(("more",), [1], StopRule(1))


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode", "in flight", "held", "parked", "preempted"])
def test_cancel_in_every_state_frees_everything(when: str) -> None:
    world = World(num_blocks=8, max_num_seqs=3, budget=4)
    victim = "r"
    if when == "held":
        world.submit("writer", [1] * 9, 2)
    if when == "preempted":
        world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
        crowd(world, ["a", "b", "r"])
        while not preempted(world):
            world.run_once()
        victim = preempted(world)[0]
    else:
        world.submit("r", [1] * 9, 6, credit=1 if when == "parked" else None)
    for _ in range({"prefill": 1, "decode": 4, "held": 1, "parked": 4}.get(when, 0)):
        world.run_once()
    if when == "in flight":
        planned(world)
    world.cancel(victim)
    assert world.reason[victim] == "cancelled"
    world.cancel(victim)  # twice is once
    world.run()
    world.verify()
    assert world.scheduler.cache.pool.num_used == 0


def test_a_row_of_nan_ends_its_request_only_and_publishes_nothing_more() -> None:
    world = World()
    world.submit("bad", [1, 2, 3, 4, 5, 6], 6)
    world.submit("good", [2, 2, 3, 4, 5, 6], 6)
    world.plan(fail=frozenset({"bad"}))
    world.run()
    world.verify()
    assert world.reason == {"bad": "error", "good": "length"}
    (error,) = [event.error for event in world.events if event.id == "bad" and event.finish_reason]
    assert error is not None
    assert error[0] == "numerical_error"
    world.submit("again", [1, 2, 3, 4, 5, 6], 2)
    world.run()
    world.verify()
    assert [event.cached for event in world.events if event.id == "again" and event.cached is not None] == [0]


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 0}, {"max_model_len": 0}, {"max_num_seqs": 8, "max_num_batched_tokens": 7}, {"policy": "random"}],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        SchedulerConfig(**settings)


def test_steps_must_be_committed_in_order() -> None:
    world = World()
    world.submit("r", [1, 2], 6)
    planned(world)
    step = planned(world)
    with pytest.raises(AssertionError, match="before step"):
        world.scheduler.commit(step, world.flight[1][1])


# -- forks ------------------------------------------------------------------------------------------------------------


def forked(*, at: int, own: list[int], steps: int = 7, parked: bool = False, num_blocks: int = 16) -> tuple[World, int]:
    """A parent that has run for some steps, and a fork of it at some output token; (world, tokens computed for the fork)."""
    world = World(num_blocks=num_blocks, budget=16)
    world.submit("parent", [1, 2, 3, 4, 5, 6], 20, credit=steps if parked else None)
    for _ in range(steps):
        world.run_once()
    tokens, num_prompt = world.scheduler.tokens_of("parent")
    before = world.memory.computed_tokens
    world.submit("fork", tokens[: num_prompt + at] + own, 3, fork_of="parent")
    alone = 0
    while "fork" not in world.reason:
        world.run_once()
        alone += 1
        assert alone < 20
    computed = world.memory.computed_tokens - before
    if not parked:
        computed -= sum(1 for step in world.steps[-alone:] if 0 in step.rows)  # the parent's own tokens
    world.verify()
    world.check()
    return world, computed


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_fork_of_a_live_request_computes_only_what_is_new(at: int) -> None:
    world, computed = forked(at=at, own=[0, 1])
    assert computed == 2 + 2, "its two own tokens, and two of the three it generates are fed back"
    assert world.scheduler.stats().cached_tokens == 6 + at


def test_a_fork_that_adds_nothing_computes_its_last_token_again() -> None:
    _, computed = forked(at=4, own=[])
    assert computed == 1 + 2


def test_a_fork_of_a_parked_parent_does_not_wait_for_it() -> None:
    """The parent's newest token is not computed and will not be: it is computed for the fork."""
    world, computed = forked(at=7, own=[0], parked=True)
    assert "parent" not in world.reason
    assert computed == 1 + 1 + 2


def test_a_fork_of_a_finished_request_finds_its_blocks_in_the_cache() -> None:
    world = World()
    world.submit("parent", [1, 2, 3, 4, 5, 6], 6)
    world.run()
    tokens = [1, 2, 3, 4, 5, 6, *world.output["parent"]]
    world.submit("fork", [*tokens, 0], 2, fork_of="parent")
    world.run()
    world.verify()
    # Its last token was never fed back, so eleven are computed: two whole blocks.
    assert world.scheduler.stats().cached_tokens == 8


def test_a_fork_with_another_salt_shares_nothing() -> None:
    world = World()
    world.submit("parent", [1, 2, 3, 4, 5, 6], 20)
    for _ in range(3):
        world.run_once()
    world.submit("fork", [1, 2, 3, 4, 5, 6, 0], 2, fork_of="parent", salt="other")
    world.run()
    world.verify()
    assert world.scheduler.stats().cached_tokens == 0


def test_a_fork_that_begins_otherwise_is_a_request_like_any_other() -> None:
    world = World()
    world.submit("parent", [1, 2, 3, 4, 5, 6], 20)
    world.run_once()
    world.submit("fork", [2, 2, 2], 2, fork_of="parent")
    world.submit("orphan", [3, 2, 2], 2, fork_of="nobody")
    world.run()
    world.verify()


def test_a_squeeze_keeps_steps_small_has_the_newest_wait_and_ends() -> None:
    world = World(max_num_seqs=4, budget=32, num_blocks=64)
    for index in range(4):
        world.submit(f"r{index}", [1, 2, 3, index], 8)
    world.run_once()
    assert len(world.scheduler._roster.running) == 4
    world.squeeze(2)
    world.submit("r4", [5] * 9, 8)
    for _ in range(3):
        world.run_once()
        assert world.steps[-1].num_tokens <= 2
        assert list(world.scheduler._roster.running) == ["r0", "r1"]
    world.squeeze(32)
    world.run_once()
    assert len(world.scheduler._roster.running) == 4
    world.run()
    world.verify()
    assert set(world.reason) == {f"r{index}" for index in range(5)}


def test_who_does_not_read_keeps_nobody_from_the_only_place_of_a_squeeze() -> None:
    world = World(max_num_seqs=4, budget=32, num_blocks=64)
    world.submit("parked", [1, 2, 3], 8, credit=1)
    world.run_once()
    world.squeeze(1)
    world.submit("reads", [1, 2, 4], 8)
    world.run()
    assert set(world.reason) == {"reads"}
    world.scheduler.credit("parked", 8)
    world.run()
    world.verify()
    assert set(world.reason) == {"reads", "parked"}


def test_who_reads_again_during_a_squeeze_waits_for_a_place() -> None:
    world = World(max_num_seqs=4, budget=32, num_blocks=64)
    for index in range(3):
        world.submit(f"r{index}", [1, 2, 3, index], 8, credit=1 if index else None)
    world.run_once()
    world.squeeze(1)
    for index in (1, 2):
        world.scheduler.credit(f"r{index}", 8)
    first = len(world.steps)
    world.run()
    world.verify()
    assert set(world.reason) == {"r0", "r1", "r2"}
    assert all(step.num_tokens == 1 for step in world.steps[first:])

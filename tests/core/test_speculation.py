"""Drafts are checked in one step, count for nothing when they are wrong, and displace nobody."""

from __future__ import annotations

import pytest

from streamkv.core.config import SchedulerConfig
from tests.core.model import World


def steps_of(*, draft_rows: int, max_tokens: int = 40, look_ahead: bool = True) -> World:
    world = World(num_blocks=40, draft_rows=draft_rows, budget=32)
    world.submit("a", [1, 2, 3], max_tokens, speculate=True)
    world.run(look_ahead=look_ahead)
    world.verify()
    return world


@pytest.mark.parametrize("look_ahead", [True, False])
def test_the_same_tokens_in_fewer_steps(look_ahead: bool) -> None:
    plain, drafted = steps_of(draft_rows=0, look_ahead=look_ahead), steps_of(draft_rows=32, look_ahead=look_ahead)
    assert drafted.output == plain.output
    assert len(drafted.steps) < 0.5 * len(plain.steps)
    stats = drafted.scheduler.stats()
    assert stats.drafts > 5
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.output_tokens == 40
    assert plain.scheduler.stats()[-3:] == (0, 0, 0)


def test_nobody_who_did_not_ask_for_it_gets_drafts() -> None:
    world = World(draft_rows=32, budget=32)
    world.submit("a", [1, 2, 3], 6)
    world.run()
    assert all(set(step.samples) <= {0, 1} for step in world.steps)


def test_a_step_has_no_more_rows_than_pay() -> None:
    world = World(num_blocks=60, max_num_seqs=4, draft_rows=9, budget=32)
    for name in "abcd":
        world.submit(name, [1, 2, 3], 20, speculate=True)
    world.run()
    world.verify()
    decodes = [step for step in world.steps if not step.admitted]
    assert max(step.num_tokens for step in decodes) <= 9
    assert max(max(step.samples) for step in decodes) > 1


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_drafts_end_where_the_request_ends(max_tokens: int) -> None:
    world = steps_of(draft_rows=32, max_tokens=max_tokens)
    assert len(world.output["a"]) == max_tokens


def test_drafts_end_where_the_credit_ends() -> None:
    world = World(num_blocks=40, draft_rows=32, budget=32)
    world.submit("a", [1, 2, 3], 20, speculate=True, credit=0)
    for limit in range(1, 21):
        world.scheduler.credit("a", limit)
        world.run()
        assert len(world.output["a"]) == limit
    world.verify()


def test_a_stop_token_inside_a_draft_ends_the_request_there() -> None:
    for token in range(7):
        world = World(num_blocks=40, draft_rows=32, budget=32)
        world.submit("a", [1, 2, 3], 40, speculate=True, stop_token_ids=frozenset({token}))
        world.run()
        world.verify()


def test_what_a_draft_has_written_can_be_hit_afterwards() -> None:
    world = steps_of(draft_rows=32)
    world.submit("b", [1, 2, 3, *world.output["a"]], 1)
    world.run()
    cached = [event.cached for event in world.events if event.id == "b" and event.cached is not None]
    # 43 tokens, the last of which was never computed: ten full blocks of four.
    assert cached == [40]


def test_without_free_blocks_nobody_drafts_and_everybody_ends() -> None:
    world = World(num_blocks=8, max_num_seqs=4, draft_rows=32, budget=32)
    for name in "abcd":
        world.submit(name, [1, 2, 3, 4, 5, 6], 12, speculate=True)
    world.run()
    world.verify()
    assert set(world.reason.values()) == {"length"}


def test_the_next_step_waits_for_the_drafts() -> None:
    world = World(num_blocks=40, draft_rows=32, budget=32)
    world.submit("a", [1, 2, 3], 20, speculate=True)
    while not (world.plan() or True) or world.steps[-1].samples[0] < 2:
        world.commit_all()
    assert world.plan() is None
    world.commit()
    assert world.plan() is not None


@pytest.mark.parametrize("rows", [-1, 9])
def test_rows_beyond_the_budget_are_no_setting(rows: int) -> None:
    with pytest.raises(ValueError, match="draft_rows must be between 0 and max_num_batched_tokens"):
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8, draft_rows=rows)

"""Every bug that fuzzing found in the scheduler, by name, as the shortest story that showed it."""

from __future__ import annotations

from tests.core.model import World
from tests.core.test_scheduler import crowd, preempted


def crowded() -> World:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
    crowd(world, ["a", "b", "c"])
    return world


def until_preempted(world: World, nan_in_step: int = -1, victim: str = "") -> str:
    """Plan ahead until a plan preempts somebody whose last step is still in flight; returns who."""
    while True:
        world.plan(fail=frozenset({victim}) if len(world.steps) == nan_in_step else frozenset())
        world.check()
        world.take(world.scheduler.take_events())
        if preempted(world):
            return preempted(world)[0]
        while len(world.flight) > 1:
            world.commit()


def test_a_preempted_request_is_not_admitted_while_its_last_step_runs() -> None:
    """Its row would be in two steps under two block tables."""
    world = World(num_blocks=6, block_size=4)
    world.submit("parked", [1, 2, 3], 5, credit=1)
    world.plan()
    world.submit("large", [2] * 24, 1)
    assert world.plan() is None, "takes the blocks of the parked one and must wait for its step"
    world.take(world.scheduler.take_events())
    assert preempted(world) == ["parked"]
    world.scheduler.credit("parked", 9)
    assert world.plan() is None
    world.run()
    world.verify()
    assert world.reason == {"parked": "length", "large": "length"}


def test_two_tokens_of_one_request_may_be_pending_at_once() -> None:
    """One bit instead of a count let a third token be planned past `max_tokens`."""
    world = World()
    world.submit("r", [1, 2], 2)
    world.plan()
    world.plan()
    assert world.scheduler._roster.live["r"].pending == 2
    world.commit()
    assert world.plan() is None
    world.commit()
    assert world.reason == {"r": "length"}
    assert len(world.output["r"]) == 2


def test_no_sample_forks_from_a_prompt_that_this_very_step_copies() -> None:
    """A leader whose whole prompt is a hit has it by a copy; copies of a step read before they write."""
    world = World()
    world.submit("first", [1, 2, 3, 4, 5, 6, 0, 1], 1)
    world.run()
    world.submit("r", [1, 2, 3, 4, 5, 6, 0, 1], 3, n=2)
    step = world.plan()
    assert step is not None
    assert [name for _, name in step.admitted] == ["r/0"]
    world.run()
    world.verify()


def test_a_parked_victim_with_a_row_in_the_step_being_planned_is_spared() -> None:
    """It got its last accepted token planned a moment ago: its blocks are being written by this step."""
    world = World(num_blocks=5, block_size=2, max_num_seqs=3, budget=16)
    world.submit("parking", [1, 2, 3], 6, credit=2)
    world.run_once()
    world.submit("new", [4, 5, 6, 0, 1], 2)
    step = world.plan()  # plans the second token of "parking", which parks it, and then wants room for "new"
    assert step is not None
    assert [world.memory.names[row] for row in step.rows] == ["parking"], "there must be no room for both, or this tests nothing"
    assert world.scheduler._roster.live["parking"].parked
    world.take(world.scheduler.take_events())
    assert preempted(world) == []
    world.check()
    world.plan()
    world.take(world.scheduler.take_events())
    assert preempted(world) == ["parking"], "from the next step on its blocks may be taken"
    world.scheduler.credit("parking", 100)
    world.run()
    world.verify()


def test_a_preemption_that_wakes_held_siblings_may_change_the_head_of_the_queue() -> None:
    """The head was popped after the heap had changed, so another request was lost."""
    world = World(num_blocks=7, block_size=2, max_num_seqs=4, budget=9, policy="priority")
    world.submit("parked writer", [1, 2, 3, 4, 5, 6], 3, credit=0, priority=1)
    world.submit("writer", [1, 2, 3, 4, 5, 6], 3, credit=1, priority=1)
    world.run_once()
    world.submit("held", [1, 2, 3, 4, 5, 6, 0], 2, priority=-1)
    world.submit("head", [5, 5, 5, 5, 5, 5], 2, priority=0)
    for name in ("parked writer", "writer"):
        world.scheduler.credit(name, 100)
    world.run()
    world.verify()
    assert set(world.reason.values()) == {"length"}


def test_nothing_is_said_about_a_request_after_its_last_event() -> None:
    """A state event from an earlier plan came out with the commit that followed the cancel."""
    world = World()
    world.submit("r", [1, 2, 3], 4)
    world.plan()  # notes "prefill"
    world.cancel("r")
    world.commit()
    assert [event.finish_reason for event in world.events if event.id == "r"] == ["cancelled"]


def test_nan_left_behind_by_a_request_that_was_cancelled_meanwhile_is_cleared() -> None:
    """Only live requests had their blocks cleared; the next owner found NaN behind its last token."""
    world = World()
    world.submit("r", [1, 2, 3, 4, 5], 4)
    world.plan(fail=frozenset({"r"}))
    world.cancel("r")
    world.commit()
    world.check()
    world.submit("next", [2, 2, 2, 2, 2], 2)
    step = world.plan()
    assert step is not None
    assert step.clears
    world.run()
    world.verify()


def test_nan_left_behind_by_a_preempted_request_ends_it_and_is_cleared() -> None:
    first = crowded()
    victim = until_preempted(first)
    world = crowded()
    assert until_preempted(world, len(first.steps) - 2, victim) == victim, "NaN in its last step before"
    world.commit()
    world.check()
    assert world.reason == {victim: "error"}
    world.run()
    world.verify()


def test_samples_run_beside_the_first_one_and_not_after_it() -> None:
    """A leader that decodes is in every step, and was taken for one that had just entered: its siblings waited for its end."""
    world = World()
    world.submit("r", [1, 2, 3, 4, 5, 6], 8, n=3)
    world.run()
    world.verify()
    rows = [len(step.rows) for step in world.steps]
    assert max(rows) == 3
    assert len(rows) <= 8 + 2 + 1, f"{len(rows)} steps, of {rows} rows"
    assert world.scheduler.stats().cached_tokens == 2 * 5, "each shares all of the prompt but its last token"

"""Nothing of a request is computed once its deadline has passed; what has begun in time is never ended for it."""

from __future__ import annotations

import pytest

from tests.core.model import World
from tests.core.test_scheduler import planned, preempted, rows_of

TOO_LATE = ("deadline_exceeded", "the request waited longer than its time limit; nothing of it was computed")


def busy(**options: int) -> World:
    """One row, taken for the next steps. `World.plan` counts the seconds: the first plan is at 1."""
    world = World(**{"max_num_seqs": 1, "budget": 8} | options)  # type: ignore[arg-type]  # by name
    world.submit("running", [1, 2, 3], 4)
    world.run_once()
    return world


def ends(world: World) -> dict[str, tuple[str, str] | None]:
    world.take(world.scheduler.take_events())
    return {event.id: event.error for event in world.events if event.finish_reason == "error"}


def test_the_plan_at_the_deadline_ends_it_and_the_one_before_would_have_begun_it() -> None:
    for deadline, begins in ((5.0, False), (5.001, True)):
        world = busy()
        world.submit("late", [4, 5], 2, deadline=deadline)
        for _ in range(3):
            world.run_once()
        assert world.reason == {"running": "length"}
        step = world.plan()  # at 5: the row is free
        assert (step is not None and list(rows_of(world, step)) == ["late"]) == begins
        world.commit_all()
        assert ends(world) == ({} if begins else {"late": TOO_LATE})
        world.run()
        world.verify()


def test_it_ends_while_others_run_wherever_it_waits() -> None:
    world = busy()
    world.submit("next", [4, 5], 2)
    world.submit("in line", [6, 6], 2, deadline=3.0)
    world.submit("asleep", [6, 5], 2, deadline=3.0, credit=0)
    world.run_once()
    assert ends(world) == {}
    world.run_once()
    assert ends(world) == {"in line": TOO_LATE, "asleep": TOO_LATE}
    world.run()
    world.verify()
    assert world.reason["next"] == "length"


def test_it_ends_while_it_is_held_back() -> None:
    world = World(num_blocks=32, budget=32, max_num_seqs=2)
    world.submit("writer", [1, 2, 3, 4, 5, 6, 0, 1, 2], 2)
    world.submit("held", [1, 2, 3, 4, 5, 6, 0, 1, 3], 2, deadline=2.0)
    planned(world)
    assert world.scheduler._roster.waiting.held
    planned(world)
    assert ends(world) == {"held": TOO_LATE}
    world.run()
    world.verify()


def test_it_ends_though_no_step_is_made() -> None:
    world = World()
    world.submit("asleep", [1, 2], 2, deadline=1.0, credit=0)
    assert world.plan() is None
    assert ends(world) == {"asleep": TOO_LATE}
    assert not world.scheduler.has_requests


def test_what_has_begun_is_not_ended_not_even_when_it_waits_again() -> None:
    world = World(num_blocks=8, block_size=4, max_num_seqs=3, budget=16)
    for index, name in enumerate("abc"):
        world.submit(name, [index, index + 1, index, index], 12, deadline=1.5)
    world.run()
    assert preempted(world)
    assert world.reason == dict.fromkeys("abc", "length")
    world.verify()


def test_samples_begin_with_the_first_of_them() -> None:
    world = busy()
    world.submit("r", [4, 5, 6, 4, 5], 3, n=2, deadline=6.0)
    world.submit("s", [4, 4, 6, 4, 5], 3, n=2, deadline=6.0)
    while world.scheduler.has_requests:
        world.run_once()
    world.verify()
    assert world.reason == {"running": "length", "r/0": "length", "r/1": "length", "s/0": "error", "s/1": "error"}


@pytest.mark.parametrize("cancelled", ["r/0", "r/1"])
def test_a_cancelled_sample_is_not_ended_twice(cancelled: str) -> None:
    world = busy()
    world.submit("r", [4, 5, 6, 4, 5], 3, n=2, deadline=2.0)
    world.cancel(cancelled)
    world.run()
    assert world.reason == {"running": "length", "r/0": "error", "r/1": "error"} | {cancelled: "cancelled"}


def test_the_next_deadline_is_that_of_somebody_who_still_waits() -> None:
    world = busy()
    assert world.scheduler.next_deadline is None
    world.submit("first", [4], 1, deadline=7.0)
    world.submit("second", [5], 1, deadline=9.0)
    assert world.scheduler.next_deadline == 7.0
    world.cancel("first")
    assert world.scheduler.next_deadline == 9.0
    world.run()
    assert world.reason["second"] == "length"
    assert world.scheduler.next_deadline is None


def test_deadlines_that_were_kept_do_not_pile_up() -> None:
    world = World()
    for index in range(500):
        world.submit(f"r{index}", [1, 2], 1, deadline=1e9)
        world.run()
    assert len(world.scheduler._roster.waiting._deadlines) <= 65

"""What the blocks of a preempted request held moves to the host and back. The random walk is `test_machine.py`."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from streamkv.core.replay import RecordingScheduler, replay
from streamkv.core.step import Step
from tests.core.model import World


def crowded(**options: object) -> World:
    """Three requests whose outputs need more blocks than there are."""
    settings = {"num_blocks": 8, "max_num_seqs": 3, "num_host_slots": 20, **options}
    world = World(**settings)  # type: ignore[arg-type]  # the keywords of a test
    for index, name in enumerate("abc"):
        world.submit(name, [index, index + 1, index, index], 12)
    return world


def finish(world: World, *, look_ahead: bool = True) -> None:
    """Everybody ends with the right tokens, and nothing is left anywhere."""
    world.run(look_ahead=look_ahead)
    world.verify()
    assert set(world.reason) == set(world.asked)
    assert not world.scheduler.cache.host.num_used
    world.check()


def until_swapped(world: World) -> Step:
    """Plan and commit until a step moves something out."""
    for _ in range(50):
        step = world.plan()
        assert step is not None
        if step.swap_out:
            return step
        world.commit()
    raise AssertionError("nothing was moved out")


def waiting(world: World) -> str:
    """The request that the host keeps."""
    (request,) = world.scheduler.cache.host.holders()
    return request.id


@pytest.mark.smoke
@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_request_comes_back_without_computing_anything_twice(caching: bool) -> None:
    world = crowded(caching=caching)
    finish(world, look_ahead=False)
    stats = world.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.swapped_out >= stats.swapped_in > 0
    assert world.memory.computed_tokens == 3 * (4 + 12 - 1), "every token but the last of each, once"
    finish(moved_ahead := crowded(caching=caching))
    assert moved_ahead.scheduler.stats().swapped_in > 0


def test_what_a_step_in_flight_writes_is_moved_too() -> None:
    """The step that moves runs behind it."""
    world = crowded(caching=False)
    for _ in range(50):
        while len(world.flight) > 1:
            world.commit()
        step = world.plan()
        if step is not None and step.swap_out:
            break
    (request,) = world.scheduler.cache.host.holders()
    assert request.saved is not None
    assert world.flight[0][0].id == request.last_step, "its last step is in flight"
    assert request.saved.tokens == len(request.tokens)
    finish(world)
    assert world.memory.computed_tokens == 3 * (4 + 12 - 1)


def test_computing_again_is_chosen_where_it_is_cheaper() -> None:
    for block_tokens, moves in ((3.9, True), (4.0, False)):
        world = World(num_blocks=8, max_num_seqs=2, num_host_slots=20, swap_block_tokens=block_tokens)
        world.submit("guard", [1] * 9, 20)
        world.submit("victim", [2, 3, 4, 5, 6, 0, 1], 9, credit=1)  # parked with 7 tokens computed, then 8
        world.scheduler.credit("victim", 2)
        world.run()
        finish_with_credit(world)
        assert (world.scheduler.stats().swapped_out > 0) == moves, block_tokens


def finish_with_credit(world: World) -> None:
    for name in world.scheduler.live_ids():
        world.scheduler.credit(name, 100)
    finish(world)


def test_a_host_that_is_full_keeps_what_it_has_and_the_rest_is_computed_again() -> None:
    world = crowded(num_host_slots=1)
    finish(world)
    stats = world.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.swapped_out == 0, "no victim held one block only"
    world = crowded(num_host_slots=3)
    world.submit("d", [6, 6, 6, 6], 12)
    finish(world)
    assert world.scheduler.stats().swapped_out > 0


@pytest.mark.parametrize("committed", [True, False])
def test_who_is_cancelled_while_the_host_keeps_it_leaves_its_slots(committed: bool) -> None:
    world = crowded()
    until_swapped(world)
    if committed:
        world.commit()
    assert world.scheduler.stats().host_slots_used > 0
    world.cancel(waiting(world))
    assert world.scheduler.stats().host_slots_used == 0
    world.check()
    finish(world)


def test_slots_of_who_is_cancelled_before_a_step_moved_its_blocks_are_not_written() -> None:
    """A plan may preempt and still have nothing to compute: what it wanted to move waits for the next step."""
    world = crowded()
    until_swapped(world)
    world.commit_all()
    host = world.scheduler.cache.host
    running = next(iter(world.scheduler._roster.running.values()))
    host.drop(world.scheduler._roster.live[waiting(world)])
    host.save(running, 0, list(running.blocks), world.scheduler._next_step)
    taken = running.saved
    assert taken is not None
    host.drop(running)
    step = world.plan()
    assert step is not None
    assert not {slot for _, slot in step.swap_out} & set(taken.slots)
    finish(world)


@pytest.mark.parametrize("ran", [True, False])
def test_what_a_failed_step_was_to_move_is_computed_again(ran: bool) -> None:
    world = crowded()
    until_swapped(world)
    step, _ = world.flight[-1]
    lost = [slot for _, slot in step.swap_out]
    name = waiting(world)
    if not ran:
        for slot in lost:  # as if nothing had been moved
            world.memory.host[slot] = [None] * world.memory.block_size
    world.flight.clear()
    world.scheduler.abandon()
    assert world.scheduler.stats().host_slots_used == 0
    assert name in world.scheduler.live_ids()
    world.check()
    finish(world)


def test_what_was_moved_before_a_step_failed_is_kept() -> None:
    world = crowded()
    until_swapped(world)
    world.commit_all()
    used = world.scheduler.stats().host_slots_used
    world.crash(ran=False, ahead=True)
    assert world.scheduler.stats().host_slots_used == used > 0
    finish(world)


def test_a_slot_is_not_written_by_the_step_that_reads_it() -> None:
    """Two come back in one step and displace two others; the slots of the first are not yet there for the second of those."""
    world = World(num_blocks=8, max_num_seqs=4, budget=32, num_host_slots=9, caching=False)
    for index, name in enumerate("abcd"):
        world.submit(name, [index] * 9, 4, credit=1)
    world.run(look_ahead=False)
    assert preemptions(world) == {"a": 1, "b": 1}
    for name in "ab":
        world.scheduler.credit(name, 4)
    step = world.plan()
    assert step is not None
    assert (len(step.swap_in), len(step.swap_out)) == (6, 3)
    assert not {slot for _, slot in step.swap_in} & {slot for _, slot in step.swap_out}
    world.check()
    finish_with_credit(world)


def test_what_the_cache_still_has_is_not_moved_in() -> None:
    world = World(num_blocks=8, max_num_seqs=2, num_host_slots=20)
    world.submit("parked", [1, 2, 3, 4, 5, 6, 0, 1, 2, 3], 5, credit=1)
    world.run()
    world.submit("other", [3] * 17, 1)
    world.run()
    assert preemptions(world) == {"parked": 1}
    used = world.scheduler.stats().host_slots_used
    assert used == 3, "two full blocks and a part of one"
    world.scheduler.credit("parked", 9)
    finish(world)
    assert world.scheduler.stats().swapped_in == 1, "whole blocks were found in the cache"


def preemptions(world: World) -> dict[str, int]:
    return dict(Counter(event.id for event in world.events if event.state == "preempted"))


def test_who_comes_back_does_not_wait_for_others_to_compute_what_the_host_keeps() -> None:
    world = World(num_blocks=8, max_num_seqs=2, budget=8, num_host_slots=20)
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]
    world.submit("parked", prompt, 5, credit=1)
    world.run()
    world.submit("other", [3] * 29, 1)
    world.run()
    assert preemptions(world) == {"parked": 1}
    world.submit("twin", prompt, 2)
    world.run_once()
    world.scheduler.credit("parked", 9)
    step = world.plan()
    assert step is not None
    assert len(step.swap_in) == 2, "the blocks that the twin has not published yet"
    finish(world)


def test_what_others_share_stays_and_is_found_again() -> None:
    world = World(num_blocks=10, max_num_seqs=3, num_host_slots=20)
    world.submit("s", [1, 2, 3, 4, 5, 6, 0, 1, 2], 16, n=3)
    finish(world)
    moves = [step.swap_out for step in world.steps if step.swap_out]
    assert moves
    shared = set(world.steps[0].tables[0][2][:2])
    assert not shared & {block for pairs in moves for block, _ in pairs}, "a block that others keep was moved"


def test_who_wants_every_token_computed_is_not_moved() -> None:
    world = World(num_blocks=8, max_num_seqs=3, num_host_slots=20)
    for index, name in enumerate("abc"):
        world.submit(name, [index, index + 1, index, index], 12, use_cache=False)
    finish(world)
    assert preemptions(world)
    assert world.scheduler.stats().swapped_out == 0


def test_the_cheapest_to_bring_back_is_the_victim() -> None:
    """Moved, a long one costs less than computing a short one that wants every token computed."""
    for slots, victim in ((0, "short"), (20, "long")):
        world = World(num_blocks=9, block_size=4, max_num_seqs=3, num_host_slots=slots, swap_block_tokens=0.5)
        world.submit("first", [1, 2, 3, 1], 12)
        world.submit("long", [2] * 9, 12)
        world.submit("short", [3, 2, 3, 1], 12, use_cache=False)
        finish(world)
        assert next(event.id for event in world.events if event.state == "preempted") == victim


def test_a_log_with_moves_replays() -> None:
    lines: list[str] = []
    world = crowded(swap_block_tokens=0.25)
    world.scheduler = RecordingScheduler(world.scheduler.config, world.scheduler.cache, lines.append)
    for index, name in enumerate("xyz"):
        world.submit(name, [index, index, index + 1, 3], 12)
    world.asked = {name: asked for name, asked in world.asked.items() if name in "xyz"}
    finish(world)
    again = replay(lines)
    assert again.stats() == world.scheduler.stats()
    steps = [json.loads(line).get("step") for line in lines]
    assert any(step and step["swap_in"] for step in steps)

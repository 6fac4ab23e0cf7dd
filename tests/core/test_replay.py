"""A recorded log replays to the same steps, and a log that was tampered with does not."""

from __future__ import annotations

import json

import pytest

from streamkv.core.replay import RecordingScheduler, ReplayError, replay
from tests.core.model import World


def recorded() -> tuple[World, list[str]]:
    """A crowded run with look-ahead, preemption, a cancel, credit, NaN and a crash."""
    lines: list[str] = []
    world = World(num_blocks=10, max_num_seqs=3, budget=8)
    world.scheduler = RecordingScheduler(world.scheduler.config, world.scheduler.cache, lines.append)
    for index in range(6):
        options = {"credit": 2} if index == 1 else {"stop_token_ids": frozenset({4})}
        world.submit(f"r{index}", [1, 2, 3, 4, 5, index], 6, n=1 + index % 2, **options)
    for _ in range(3):
        world.plan()
        world.commit()
    world.cancel("r2")
    world.crash(ran=True, ahead=True)
    world.squeeze(2)
    world.plan()
    world.commit()
    world.squeeze(8)
    world.plan(fail=frozenset(world.scheduler.live_ids()[:1]))
    world.run()
    world.scheduler.credit("r1/0", 9)
    world.scheduler.credit("r1/1", 9)
    world.run()
    world.verify()
    return world, lines


@pytest.mark.smoke
def test_a_log_replays_to_the_same_steps_and_the_same_end() -> None:
    world, lines = recorded()
    again = replay(lines)
    assert again.stats() == world.scheduler.stats()
    assert not again.live_ids()
    calls = {"start", "submit", "plan", "commit", "cancel", "credit", "abandon", "squeeze"}
    assert {json.loads(line)["call"] for line in lines} == calls


def test_another_policy_is_noticed_at_the_first_plan_that_differs() -> None:
    _, lines = recorded()
    start = json.loads(lines[0])
    start["config"]["max_num_batched_tokens"] = 4
    with pytest.raises(ReplayError, match=r"line \d+: planned"):
        replay([json.dumps(start), *lines[1:]])


def test_an_unknown_call_is_named() -> None:
    _, lines = recorded()
    with pytest.raises(ReplayError, match="line 2: unknown call 'dance'"):
        replay([lines[0], '{"call": "dance"}'])

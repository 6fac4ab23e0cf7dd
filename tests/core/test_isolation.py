"""What a tenant computes does not depend on what another has cached or is computing (CVE-2025-46570, R-TIMING).

The same history is played twice. The second time every token of the other tenant is another one: so it has the same work to do
and shares as much with itself, but no prompt of it begins as one of the victim's does. Every step must come out the same: rows,
ranges, blocks, copies. What is equal step by step takes as long; no clock has to say so.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamkv.core.step import Event
from tests.core.model import VOCAB, World

PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 0, 1, 2], [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6], [5] * 11]


MOVES = st.one_of(
    st.tuples(st.just("other"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("victim"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("fork"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("plan"), st.just(0)),
    st.tuples(st.just("commit"), st.just(0)),
)


def play(moves: list[tuple[str, int]], num_blocks: int, *, shift: int) -> tuple[list[dict[str, Any]], list[Event]]:
    """Every step, without the other's tokens, and everything that the victim is told. The other generates nothing further."""
    world = World(num_blocks=num_blocks, block_size=2, budget=16)
    for number, (move, which) in enumerate(moves):
        prompt = PROMPTS[which]
        match move:
            case "other":
                shifted = [(token + shift) % VOCAB for token in prompt]
                world.submit(f"other{number}", shifted, 1, tenant="other", salt="other")
            case "victim":
                world.submit(f"victim{number}", prompt, 3, n=1 + which % 2, tenant="victim", salt="victim")
            case "fork":  # of a request that is not its own: an id that was guessed
                parent = next((name for name in world.scheduler.live_ids() if name.startswith("other")), None)
                world.submit(f"victim{number}", prompt, 2, tenant="victim", salt="victim", fork_of=parent)
            case "plan" if len(world.flight) < 2:
                world.plan()
            case "commit" if world.flight:
                world.commit()
    world.run()
    world.verify()
    return [blind(asdict(step)) for step in world.steps], [event for event in world.events if event.id.startswith("victim")]


def blind(step: dict[str, Any]) -> dict[str, Any]:
    """A step's work: everything but which tokens it reads."""
    return step | {"tokens": len(step["tokens"])}


@settings(max_examples=400, deadline=None)
@given(moves=st.lists(MOVES, min_size=2, max_size=40), num_blocks=st.sampled_from([8, 12, 40]))
@example(moves=[("other", 3), *[("plan", 0), ("commit", 0)] * 3, ("victim", 3)], num_blocks=40)  # cached by the other
@example(moves=[("other", 3), ("victim", 3)], num_blocks=40)  # being computed by the other
@example(moves=[("other", 3), ("plan", 0), ("commit", 0), ("fork", 3)], num_blocks=40)
def test_r_timing_what_is_computed_does_not_depend_on_what_another_tenant_sends(
    moves: list[tuple[str, int]], num_blocks: int
) -> None:
    told = play(moves, num_blocks, shift=0)
    for shift in (1, 2):
        assert play(moves, num_blocks, shift=shift) == told


def test_it_does_depend_on_what_the_tenant_itself_has_sent() -> None:
    """The control: without it the test above could be blind."""
    moves = [("victim", 2), *[("plan", 0), ("commit", 0)] * 4, ("victim", 2)]
    _, told = play(moves, 40, shift=0)
    assert {event.cached for event in told if event.cached is not None} > {0}

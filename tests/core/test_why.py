"""What a request is told about its prompt: in how many steps it was computed, and why the cache did not have more of it."""

from __future__ import annotations

import pytest

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.request import StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Event, Sampled

SIZE = 4
FIRST = [1, 2, 3, 4, 5, 6, 7, 8, 9]


class Told:
    """A scheduler whose model always says 0, and what each request heard."""

    def __init__(self, num_blocks: int = 32, *, budget: int = 64, caching: bool = True) -> None:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=128)
        self.scheduler = Scheduler(config, KVCache(num_blocks, SIZE, enable_prefix_caching=caching))
        self.heard: dict[str, list[Event]] = {}
        self.now = 0.0

    def run(self, name: str, prompt: list[int], max_tokens: int = 1, **options: object) -> tuple[int, str | None, int]:
        """(cached tokens, miss, chunks)."""
        self.scheduler.submit((name,), prompt, StopRule(max_tokens), **options)  # type: ignore[arg-type]  # as submit takes them
        self.finish()
        events = self.heard[name]
        entered = next(event for event in events if event.state == "prefill")
        return entered.cached or 0, entered.miss, max(event.chunks for event in events)

    def finish(self) -> None:
        while self.scheduler.has_requests:
            self.now += 1
            step = self.scheduler.plan(self.now)
            events = self.scheduler.take_events()
            if step is not None:
                events += self.scheduler.commit(step, Sampled([(0,) if wanted else () for wanted in step.samples]))
            for event in events:
                self.heard.setdefault(event.id, []).append(event)
        self.scheduler.check()


def test_nothing_begins_like_it():
    told = Told()
    assert told.run("a", FIRST) == (0, "not_cached", 1)
    assert told.run("b", [3, *FIRST]) == (0, "not_cached", 1)


def test_the_position_of_the_first_token_that_differs():
    told = Told()
    told.run("a", FIRST)
    assert told.run("b", [*FIRST[:6], 0, 0, 0]) == (6, "differs", 1)
    assert told.run("c", [*FIRST[:1], 0]) == (1, None, 1), "only its last token is left, which is always computed"
    assert told.run("d", [*FIRST[:2], 0, 0]) == (2, "differs", 1)


def test_what_is_cached_ends_where_only_a_part_of_a_block_followed():
    told = Told()
    told.run("a", FIRST)  # the ninth token never filled a block
    assert told.run("b", [*FIRST, 1, 1, 1, 1]) == (8, "not_cached", 1)
    assert told.run("c", FIRST) == (8, None, 1)


def test_what_was_lost_to_others_is_told_apart():
    told = Told(num_blocks=4)
    told.run("a", FIRST)
    told.run("b", [0] * 13)  # takes every block
    assert told.run("c", FIRST) == (0, "evicted", 1)
    assert told.run("d", [9, 9, 9, 9, 9])[1] == "not_cached"


def test_another_salt_is_not_told_that_anything_is_there():
    told = Told()
    told.run("a", FIRST, salt="one")
    assert told.run("b", FIRST, salt="two") == (0, "not_cached", 1)
    assert told.run("c", FIRST, salt="one") == (8, None, 1)


@pytest.mark.parametrize(("caching", "use_cache"), [(False, True), (True, False)])
def test_who_does_not_read_the_cache(caching: bool, use_cache: bool):
    told = Told(caching=caching)
    told.run("a", FIRST, use_cache=use_cache)
    assert told.run("b", FIRST, use_cache=use_cache) == (0, "off", 1)


def test_the_steps_that_a_prompt_took():
    told = Told(budget=8)
    assert told.run("a", list(range(20)), max_tokens=5)[2] == 3
    assert told.run("nothing generated", list(range(30, 50)), max_tokens=0)[2] == 3
    assert sum(bool(event.chunks) for event in told.heard["a"]) == 1, "told once"


def test_evictions_that_are_remembered_are_bounded():
    told = Told(num_blocks=4)
    for index in range(50):
        told.run(f"r{index}", [index, *FIRST])
    pool = told.scheduler.cache.pool
    assert len(pool._evicted) == 4
    assert pool.num_evictions > 50

"""`EngineClient.kv_map`: asked of every engine, and of the real one in detail."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from streamkv.core.step import Step
from streamkv.engine.api import KV_STATES, STEP_TOKEN_BOUNDS, EngineClient, KVMap
from tests.engine.driving import DEADLINE_S, Reader
from tests.engine.integers import BLOCK_SIZE, NUM_BLOCKS, ask, integer_engine
from tests.engine.test_conformance import fake, real, synchronous

PROMPT = [1, 2, 3, 4, 5]


@dataclass
class Blocks:
    """A map as columns."""

    states: list[str]
    owners: list[int]
    counts: list[int]
    filled: list[int]
    idle_since: list[float]

    @classmethod
    def of(cls, kv: KVMap) -> Blocks:
        states = [KV_STATES[index] for index in kv.states]
        owners, counts = np.frombuffer(kv.owners, "<i4"), np.frombuffer(kv.counts, "<u2")
        filled, since = np.frombuffer(kv.filled, "<u2"), np.frombuffer(kv.idle_since, "<f8")
        return cls(states, owners.tolist(), counts.tolist(), filled.tolist(), since.tolist())

    def of_request(self, kv: KVMap, name: str) -> list[int]:
        index = [request.id for request in kv.requests].index(name)
        return [block for block, owner in enumerate(self.owners) if owner == index]


@pytest.fixture(params=[fake, real, synchronous], ids=lambda start: start.__name__)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    start: Callable[[], AbstractAsyncContextManager[EngineClient]] = request.param
    async with start() as running:
        yield running


async def test_the_map_agrees_with_itself_and_with_the_counts(engine: EngineClient) -> None:
    reader = Reader(engine)
    info = engine.describe()

    async def look() -> KVMap:
        kv, stats = await engine.kv_map(), await engine.stats()  # nothing happens in between
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(kv), type=KVMap) == kv
        blocks = Blocks.of(kv)
        assert {len(column) for column in vars(blocks).values()} == {info.num_blocks}
        assert kv.block_size == info.block_size
        assert blocks.states.count("free") == stats.blocks_free
        assert blocks.states.count("cached") == stats.blocks_cached
        assert blocks.states.count("used") + blocks.states.count("fenced") == stats.blocks_used
        for state, owner, count, filled, since in zip(*vars(blocks).values(), strict=True):
            assert (owner >= 0) == (state == "used")
            assert (count > 0) == (state in ("used", "fenced"))
            assert 0 <= filled <= kv.block_size
            assert math.isnan(since) == (state != "cached")
            assert owner < len(kv.requests)
            assert (owner < -1) == (state == "cached")
            assert owner >= -1 - len(kv.salts)
        return kv

    assert (await look()).requests == ()
    await engine.submit(ask("a", PROMPT, 9, credit=3, salt="acme"))
    await engine.submit(ask("b", PROMPT, 9, salt="rival"))
    await reader.tokens("a", 3)
    await look()
    await reader.finished(["b"])
    kv = await look()
    (held,) = kv.requests
    assert (held.id, held.salt, held.prompt, held.output, held.parked) == ("a", "acme", 5, 3, True)
    assert Blocks.of(kv).of_request(kv, "a")
    await engine.cancel("a")
    await reader.finished(["a"])
    assert (await look()).requests == ()
    await engine.drain(DEADLINE_S)


async def test_sharing_waste_and_age_of_the_real_engine() -> None:
    async with integer_engine() as (engine, _):
        reader = Reader(engine)
        await engine.submit(ask("a", [1, 2, 3, 4, 5, 6, 0, 1, 2], 30, n=2, credit=1, salt="acme"))
        for name in ("a/0", "a/1"):
            await reader.tokens(name, 1)
        kv = await engine.kv_map()
        blocks = Blocks.of(kv)
        used = [block for block, state in enumerate(blocks.states) if state == "used"]
        assert sorted(blocks.counts[block] for block in used) == [1, 1, 2, 2], "two full blocks are shared, the tails are not"
        assert sorted(blocks.filled[block] for block in used) == [1, 1, BLOCK_SIZE, BLOCK_SIZE]
        for name in ("a/0", "a/1"):
            await engine.cancel(name)
        await reader.finished(["a/0", "a/1"])
        await engine.drain(DEADLINE_S)
        kv = await engine.kv_map()
        blocks = Blocks.of(kv)
        cached = [block for block, state in enumerate(blocks.states) if state == "cached"]
        assert len(cached) == 2
        assert {kv.salts[-2 - blocks.owners[block]] for block in cached} == {"acme"}
        assert all(0 <= kv.at - blocks.idle_since[block] < DEADLINE_S for block in cached)
        assert blocks.states.count("free") == NUM_BLOCKS - 2


async def test_a_block_that_a_step_may_still_write_is_nobodys() -> None:
    async with integer_engine() as (engine, runner):

        def close_behind_the_third(_step: Step, _names: list[str]) -> frozenset[str]:
            if runner.steps == 3:
                runner.gate.clear()
            return frozenset()

        runner.fault = close_behind_the_third
        reader = Reader(engine)
        await engine.submit(ask("a", PROMPT, 50))
        await reader.tokens("a", 3)  # the fourth step stands
        await engine.cancel("a")
        kv = await engine.kv_map()
        blocks = Blocks.of(kv)
        assert blocks.states.count("fenced") >= 1
        assert blocks.states.count("used") == 0
        assert not kv.requests
        runner.gate.set()
        await reader.finished(["a"])


async def test_steps_are_counted_by_their_tokens() -> None:
    async with integer_engine() as (engine, _):
        reader = Reader(engine)
        await engine.submit(ask("a", list(range(7)) * 3, 4))
        await reader.finished(["a"])
        stats = await engine.stats()
    assert len(stats.step_tokens) == len(STEP_TOKEN_BOUNDS) + 1
    assert sum(stats.step_tokens) == stats.steps
    assert stats.step_tokens[STEP_TOKEN_BOUNDS.index(32)] == 1, "21 tokens of prompt in one step"
    assert stats.step_tokens[0] == 3, "the first token came with the prompt"
    assert stats.computed_tokens == 24

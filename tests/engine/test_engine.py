"""The engine's task: batches, look-ahead, cancel, drain, and what happens when a step fails."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from streamkv.core.request import StopRule
from streamkv.core.step import Step
from streamkv.engine.api import EngineRequest
from streamkv.errors import ContextLengthError, DrainingError, InvalidRequestError, OverloadedError
from streamkv.sampling_params import Sampling
from tests.core.model import VOCAB, reference
from tests.engine.driving import Collected, Reader, run_all
from tests.engine.integers import NUM_BLOCKS, ask, integer_engine

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 0, 1, 2], [3], [2] * 20, [1, 2, 3, 4, 6, 6]]


def right(collected: dict[str, Collected], prompts: dict[str, list[int]], max_tokens: int = 6) -> bool:
    """Every listed request has exactly the reference's output."""
    return all(
        (collected[name].tokens, collected[name].last.finish_reason) == reference(prompt, name, StopRule(max_tokens))
        for name, prompt in prompts.items()
    )


@pytest.mark.parametrize("look_ahead", [True, False])
async def test_streams_come_out_right_and_everything_is_free_again(look_ahead: bool) -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(40)}
    async with integer_engine(look_ahead=look_ahead) as (engine, runner):
        collected = await run_all(engine, [ask(name, prompt) for name, prompt in prompts.items()])
        stats = await engine.stats()
        assert len(runner.threads) == 1
        assert threading.current_thread().name not in runner.threads
    assert right(collected, prompts)
    assert stats.blocks_used == stats.running == stats.waiting == 0
    assert stats.blocks_free + stats.blocks_cached == NUM_BLOCKS


async def test_a_step_is_one_batch() -> None:
    async with integer_engine() as (engine, runner):
        runner.gate.clear()
        reader = Reader(engine)
        for name in ("a", "b", "c"):
            await engine.submit(ask(name, [1, 2, 3], 5))
        runner.gate.set()
        await reader.finished(["a", "b", "c"])
        # The first step may have started with the first request alone; all others carry everybody.
        assert reader.batches <= runner.steps + 1


async def test_the_next_step_is_planned_while_one_runs() -> None:
    async with integer_engine() as (engine, runner):
        seen: list[Step] = []
        runner.fault = lambda step, _names: (seen.append(step), frozenset())[1]
        await run_all(engine, [ask("a", [1, 2, 3], 8)])
    assert [step.tokens for step in seen[1:]] == [[-1]] * 7, "decodes take what the step before sampled, unseen"


async def test_n_samples() -> None:
    async with integer_engine() as (engine, _):
        collected = await run_all(engine, [ask("s", [1, 2, 3, 4, 5, 6], n=4)])
        stats = await engine.stats()
    assert right(collected, {f"s/{branch}": [1, 2, 3, 4, 5, 6] for branch in range(4)})
    assert stats.cached_tokens == 15


async def test_cancel_while_queued_running_and_finished() -> None:
    async with integer_engine(max_num_seqs=2, max_num_batched_tokens=8) as (engine, runner):
        reader = Reader(engine)
        runner.gate.clear()
        for name in ("a", "b", "queued"):
            await engine.submit(ask(name, [1, 2, 3], 50))
        await engine.cancel("queued")
        runner.gate.set()
        await reader.tokens("a", 3)
        await engine.cancel("a", "stop")
        await engine.cancel("a")
        await engine.cancel("nobody")
        collected = await reader.finished(["a", "b", "queued"])
        stats = await engine.stats()
    assert collected["queued"].last.finish_reason == "cancelled"
    assert collected["queued"].tokens == []
    assert collected["a"].last.finish_reason == "stop"
    assert len(collected["b"].tokens) == 50
    assert stats.blocks_used == 0


async def test_a_poison_request_ends_alone() -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(8)}

    def fault(_step: Step, names: list[str]) -> frozenset[str]:
        if "r5" in names and len(seen) > 3:
            raise ValueError("bad row")
        seen.append(1)
        return frozenset()

    for look_ahead in (True, False):
        seen: list[int] = []
        async with integer_engine(look_ahead=look_ahead) as (engine, runner):
            runner.fault = fault
            collected = await run_all(engine, [ask(name, prompt) for name, prompt in prompts.items()])
            stats = await engine.stats()
        assert collected["r5"].last.finish_reason == "error"
        assert collected["r5"].last.error is not None
        assert collected["r5"].last.error[0] == "internal"
        assert right(collected, {name: prompt for name, prompt in prompts.items() if name != "r5"})
        assert stats.blocks_used == 0


async def test_a_passing_fault_hurts_nobody() -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(8)}
    for broken in range(1, 8):

        def fault(step: Step, _names: list[str], broken: int = broken) -> frozenset[str]:
            if step.id == broken:
                raise MemoryError("out of memory, once")
            return frozenset()

        async with integer_engine() as (engine, runner):
            runner.fault = fault
            collected = await run_all(engine, [ask(name, prompt) for name, prompt in prompts.items()])
        assert right(collected, prompts)


async def test_a_nan_row_ends_its_request_only_and_publishes_nothing() -> None:
    shared = [1, 2, 3, 4, 5, 6, 0, 1, 2]
    async with integer_engine() as (engine, runner):
        runner.fault = lambda _step, names: frozenset({"bad"}) if "bad" in names else frozenset()
        collected = await run_all(engine, [ask("bad", shared), ask("good", [3, 3, 3])])
        runner.fault = lambda _step, _names: frozenset()
        again = await run_all(engine, [ask("again", shared)])
        stats = await engine.stats()
    assert collected["bad"].last.error is not None
    assert collected["bad"].last.error[0] == "numerical_error"
    assert collected["bad"].tokens == []
    assert right(collected | again, {"good": [3, 3, 3], "again": shared})
    assert again["again"].cached == 0
    assert stats.blocks_used == 0


async def test_refusals_come_before_queueing() -> None:
    async with integer_engine(max_queued_requests=9, max_num_seqs=1) as (engine, runner):
        with pytest.raises(InvalidRequestError, match="empty"):
            await engine.submit(ask("x", []))
        with pytest.raises(InvalidRequestError, match="token id"):
            await engine.submit(ask("x", [0, 7]))
        with pytest.raises(InvalidRequestError, match="token id"):
            await engine.submit(ask("x", [-1]))
        with pytest.raises(ContextLengthError, match="129"):
            await engine.submit(ask("x", [1] * 123))
        runner.gate.clear()
        reader = Reader(engine)
        await engine.submit(ask("x", [1] * 122))
        with pytest.raises(InvalidRequestError, match="in use"):
            await engine.submit(ask("x", [1]))
        names = []
        with contextlib.suppress(OverloadedError):
            while len(names) < 12:
                await engine.submit(ask(f"q{len(names)}", [1]))
                names.append(f"q{len(names)}")
        assert 0 < len(names) < 12, "the queue has a bound"
        runner.gate.set()
        await reader.finished(["x", *names])


async def test_credit_parks_a_request_and_wakes_it() -> None:
    async with integer_engine() as (engine, _):
        reader = Reader(engine)
        await engine.submit(ask("slow", [1, 2, 3], 9, credit=4))
        await engine.submit(ask("fast", [1, 2, 3], 30))
        await reader.finished(["fast"])
        assert len(reader.requests["slow"].tokens) == 4
        await engine.credit("slow", 100)
        collected = await reader.finished(["slow"])
    assert right(collected, {"slow": [1, 2, 3]}, 9)


async def test_tenants_take_turns() -> None:
    entered: list[str] = []
    async with integer_engine(max_num_seqs=1, max_num_batched_tokens=8) as (engine, runner):
        runner.fault = lambda step, _names: (entered.extend(name for _, name in step.admitted), frozenset())[1]
        requests = [ask(f"a{index}", [1, 2, index], 2, tenant="a") for index in range(4)]
        await run_all(engine, [*requests, ask("b", [3, 3], 2, tenant="b")])
    assert entered.index("b") <= 2, entered


@pytest.mark.parametrize("look_ahead", [True, False])
async def test_a_request_is_ended_at_its_deadline_and_not_before_and_is_never_in_a_step(look_ahead: bool) -> None:
    """There is one place. It comes free at 9.9 and one is begun; when it comes free again it is 10, and the other is not."""
    now = 0.0
    names: set[str] = set()

    def fault(_step: Step, members: list[str]) -> frozenset[str]:
        nonlocal now
        names.update(members)
        now = 10.0 if "in time" in members else 9.9
        return frozenset()

    settings = {"look_ahead": look_ahead, "max_num_seqs": 1, "max_num_batched_tokens": 8}
    async with integer_engine(clock=lambda: now, **settings) as (engine, runner):
        runner.fault = fault
        reader = Reader(engine)
        await engine.submit(ask("a", [1, 2, 3], 3))
        for name in ("in time", "late"):
            await engine.submit(ask(name, [4, 5], 3, queue_timeout_s=10.0))
        collected = await reader.finished(["a", "in time", "late"])
    assert right(collected, {"a": [1, 2, 3], "in time": [4, 5]}, 3)
    assert collected["late"].last.error == (
        "deadline_exceeded",
        "the request waited longer than its time limit; nothing of it was computed",
    )
    assert names == {"a", "in time"}


async def test_drain_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    async with integer_engine() as (engine, runner):
        reader = Reader(engine)
        runner.gate.clear()
        await engine.submit(ask("a", [1, 2, 3], 20))
        draining = asyncio.create_task(engine.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await engine.submit(ask("late", [1]))
        runner.gate.set()
        assert await draining
        collected = await reader.finished(["a"])
        assert right(collected, {"a": [1, 2, 3]}, 20)


async def test_drain_cancels_what_does_not_finish_in_time() -> None:
    async with integer_engine() as (engine, runner):
        reader = Reader(engine)
        runner.gate.clear()
        await engine.submit(ask("a", [1, 2, 3], 20))
        assert not await engine.drain(0.0)
        runner.gate.set()
        collected = await reader.finished(["a"])
        assert collected["a"].last.finish_reason == "cancelled"


async def test_close_gives_everybody_a_last_output() -> None:
    async with integer_engine() as (engine, runner):
        reader = Reader(engine)
        await engine.submit(ask("a", [1, 2, 3], 100))
        await reader.tokens("a", 2)
        runner.gate.clear()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        runner.gate.set()
        await closing
        await reader.ended()
        assert reader.requests["a"].last.finish_reason == "cancelled"


async def test_a_bug_in_the_engine_ends_every_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with integer_engine() as (engine, runner):
        reader = Reader(engine)
        await engine.submit(ask("a", [1, 2, 3], 100))
        await reader.tokens("a", 2)

        def broken(_now: float, _only: object = None) -> None:
            raise AssertionError("a bug of ours")

        monkeypatch.setattr(engine._scheduler, "plan", broken)
        await reader.ended()
        assert reader.requests["a"].last.error == ("engine_lost", "the engine failed")
        with pytest.raises(DrainingError):
            await engine.submit(ask("b", [1]))
        monkeypatch.undo()
        assert runner.steps > 1


async def test_a_preempted_request_does_not_score_its_prompt_twice() -> None:
    """Its blocks are gone and its prompt is computed again, but what was reported stays reported."""
    prompts = {f"r{index}": [index % VOCAB, *([1, 2, 3] * 16)] for index in range(6)}
    async with integer_engine(max_num_seqs=6, max_num_batched_tokens=8, look_ahead=True) as (engine, _):
        requests = [
            EngineRequest((name,), prompt, Sampling(max_tokens=60, prompt_logprobs=0)) for name, prompt in prompts.items()
        ]
        collected = await run_all(engine, requests)
        stats = await engine.stats()
    assert stats.preemptions > 0, "the pool is too large for this test"
    for name, prompt in prompts.items():
        parts = [output.prompt_logprobs for output in collected[name].outputs if output.prompt_logprobs is not None]
        assert [part.start for part in parts] == [1 + sum(len(p.entries) for p in parts[:index]) for index in range(len(parts))]
        values = [entry.chosen for part in parts for entry in part.entries]
        assert values == [-float(position) for position in range(1, len(prompt))]


async def test_a_fork_of_a_live_request_shares_its_blocks_copy_on_write() -> None:
    async with integer_engine() as (engine, _):
        reader = Reader(engine)
        prompt = [1, 2, 3, 4, 5, 6, 0, 1, 2]
        await engine.submit(ask("parent", prompt, 30, credit=7))
        await reader.tokens("parent", 7)
        tokens = [*prompt, *reader.requests["parent"].tokens[:5]]
        before = await engine.stats()
        await engine.submit(EngineRequest(("fork",), [*tokens, 3], Sampling(max_tokens=4), fork_of="parent"))
        (fork,) = (await reader.finished(["fork"])).values()
        assert fork.cached == len(tokens), "everything but its own token was there"
        assert fork.tokens == reference([*tokens, 3], "fork", StopRule(4))[0]
        assert (await engine.stats()).cached_tokens - before.cached_tokens == len(tokens)
        await engine.credit("parent", 30)
        (parent,) = (await reader.finished(["parent"])).values()
        assert parent.tokens == reference(prompt, "parent", StopRule(30))[0]

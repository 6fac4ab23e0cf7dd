"""Steps that fail: for want of memory, because the device is lost; who ends, who does not notice, what is left."""

from __future__ import annotations

import asyncio
import random
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamkv.core.request import StopRule
from streamkv.core.step import Step
from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.squeeze import Squeeze
from streamkv.errors import DrainingError
from streamkv.runner.faults import DeviceLostError, is_out_of_memory, let_go
from streamkv.sampling_params import Sampling
from tests.core.model import reference
from tests.engine.driving import Collected, Reader, run_all
from tests.engine.integers import NUM_BLOCKS, ask, integer_engine
from tests.engine.short_of_memory import NUM_BLOCKS as BLOCKS
from tests.engine.short_of_memory import again, make_wave, running_out, small_engine
from tests.runner.tiny import save_tiny

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 0, 1, 2], [3], [2] * 20, [1, 2, 3, 4, 6, 6]]


class OutOfMemoryError(Exception):
    """As CuPy's, which is not imported here."""


def from_another(error: Exception) -> Exception:
    """Raised while that one was handled."""
    try:
        try:
            raise error
        except Exception as first:
            raise ValueError("a wrapper") from first
    except ValueError as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        OutOfMemoryError("Out of memory allocating 512 bytes (allocated so far: 0 bytes)."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        OSError(12, "Cannot allocate memory"),
        from_another(torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=repr,
)
def test_want_of_memory_is_told_whoever_says_so(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        ValueError("the model's memory is of the wrong shape"),
        IndexError("index 7 is out of bounds"),
        from_another(KeyError("memory")),
    ],
    ids=repr,
)
def test_other_errors_are_no_want_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_an_error_that_was_let_go_of_keeps_nothing_alive() -> None:
    class Large:
        """Stands for a tensor."""

    seen: list[weakref.ref[Large]] = []

    def forward() -> None:
        activations = Large()
        seen.append(weakref.ref(activations))
        raise MemoryError

    try:
        forward()
    except MemoryError as caught:
        error = from_another(caught)
    assert seen[0]() is not None
    let_go(error)
    assert seen[0]() is None


# -- the squeeze -------------------------------------------------------------------------------------------------------


def test_the_first_failure_is_retried_and_the_next_ones_halve_down_to_a_block_of_one_request() -> None:
    squeeze = Squeeze(512, 16)
    assert squeeze.failed(30, 500)
    assert squeeze.tokens == 512
    sizes = []
    tokens = 500
    while squeeze.failed(1, tokens):
        tokens = squeeze.tokens
        sizes.append(tokens)
    assert sizes == [250, 125, 62, 31, 15]
    assert [squeeze.failed(1, 15) for _ in range(3)] == [True, True, False], "the next request has tries of its own"


def test_many_requests_are_halved_even_if_they_have_less_than_a_block_together() -> None:
    squeeze = Squeeze(512, 16)
    squeeze.failed(5, 5)
    assert squeeze.failed(5, 5)
    assert squeeze.tokens == 2
    assert squeeze.failed(2, 2)
    assert squeeze.tokens == 1
    assert not squeeze.failed(1, 1)


@given(st.integers(1, 4096), st.integers(1, 64), st.lists(st.booleans(), max_size=200))
def test_it_always_grows_back_and_never_leaves_its_bounds(most: int, block_size: int, history: list[bool]) -> None:
    squeeze = Squeeze(most, block_size)
    for failed in history:
        if failed:
            squeeze.failed(min(3, squeeze.tokens), squeeze.tokens)
        else:
            squeeze.succeeded()
        assert 1 <= squeeze.tokens <= most
    steps = 0
    while squeeze.tokens < most:
        squeeze.succeeded()
        steps += 1
    assert steps <= 16 * 13
    assert not squeeze.succeeded()


# -- out of memory, on an engine whose model is arithmetic --------------------------------------------------------------


def right(collected: dict[str, Collected], prompts: dict[str, list[int]], max_tokens: int = 6) -> bool:
    """Every listed request has exactly the reference's output."""
    return all(
        (collected[name].tokens, collected[name].last.finish_reason) == reference(prompt, name, StopRule(max_tokens))
        for name, prompt in prompts.items()
    )


@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("room", [4, 9, 16])  # a block, and more
async def test_while_memory_is_short_steps_are_small_and_grow_back_afterwards(look_ahead: bool, room: int) -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(8)}
    sizes: list[int] = []
    failures = 0

    def fault(step: Step, _names: list[str]) -> frozenset[str]:
        nonlocal failures
        if step.num_tokens > room:
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(step.num_tokens)
        return frozenset()

    async with integer_engine(look_ahead=look_ahead) as (engine, runner):
        runner.fault = fault
        collected = await run_all(engine, [ask(name, prompt, 20) for name, prompt in prompts.items()])
        assert right(collected, prompts, 20)
        runner.fault = lambda step, _names: (sizes.append(step.num_tokens), frozenset())[1]
        more = {f"m{i}": [i % 7, 1, 2] for i in range(40)}
        assert right(await run_all(engine, [ask(name, prompt, 20) for name, prompt in more.items()]), more, 20)
        sizes.clear()
        await run_all(engine, [ask("long", [5] * 60)])
        stats = await engine.stats()
    assert max(sizes) == 32, "the budget has not grown back"
    assert failures < sum(map(len, prompts.values())) + 8 * 20, "it fails as often as it computes"
    assert stats.blocks_used == 0
    assert stats.blocks_free + stats.blocks_cached == NUM_BLOCKS


@pytest.mark.parametrize("look_ahead", [True, False])
async def test_a_request_that_does_not_fit_even_alone_ends_and_the_others_do_not_notice(look_ahead: bool) -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(8)}

    def fault(_step: Step, names: list[str]) -> frozenset[str]:
        if "r5" in names:
            raise MemoryError
        return frozenset()

    async with integer_engine(look_ahead=look_ahead) as (engine, runner):
        runner.fault = fault
        collected = await run_all(engine, [ask(name, prompt) for name, prompt in prompts.items()])
        stats = await engine.stats()
    error = collected.pop("r5").last.error
    assert error is not None
    assert error[0] == "out_of_memory"
    assert "send it again later" in error[1]
    prompts.pop("r5")
    assert right(collected, prompts)
    assert stats.blocks_used == 0


async def test_an_offender_and_want_of_memory_at_once() -> None:
    prompts = {f"r{i}": PROMPTS[i % len(PROMPTS)] for i in range(8)}
    source = random.Random(3)

    def fault(_step: Step, names: list[str]) -> frozenset[str]:
        if source.random() < 0.3:
            raise MemoryError
        if "r5" in names:
            raise ValueError("bad row")
        return frozenset()

    async with integer_engine() as (engine, runner):
        runner.fault = fault
        collected = await run_all(engine, [ask(name, prompt) for name, prompt in prompts.items()])
        stats = await engine.stats()
    error = collected.pop("r5").last.error
    assert error is not None
    assert error[0] == "internal"
    prompts.pop("r5")
    assert right(collected, prompts)
    assert stats.blocks_used == 0


async def test_what_a_failed_step_was_working_on_is_gone_before_the_next_one() -> None:
    class Large:
        """Stands for a tensor."""

    seen: list[weakref.ref[Large]] = []
    alive: list[bool] = []

    def fault(step: Step, _names: list[str]) -> frozenset[str]:
        if step.id == 2:
            activations = Large()
            seen.append(weakref.ref(activations))
            raise MemoryError
        return frozenset()

    async with integer_engine() as (engine, runner):
        resume = runner.resume
        runner.fault = fault
        runner.resume = lambda: (alive.append(seen[0]() is not None), resume())[1]  # type: ignore[method-assign]  # looks in passing
        await run_all(engine, [ask("a", [1, 2, 3])])
    assert alive == [False]


async def test_the_log_says_where_a_step_failed() -> None:
    places: list[str] = []

    def note(_logger: object, _name: str, event: dict[str, Any]) -> dict[str, Any]:
        if isinstance(event.get("exc_info"), Exception):
            places.extend(frame.name for frame in traceback.extract_tb(event["exc_info"].__traceback__))
        raise structlog.DropEvent

    def fault(step: Step, _names: list[str]) -> frozenset[str]:
        if step.id == 2:
            raise ValueError("once")
        return frozenset()

    before = structlog.get_config()["processors"]
    structlog.configure(processors=[note])
    try:
        async with integer_engine() as (engine, runner):
            runner.fault = fault
            await run_all(engine, [ask("a", [1, 2, 3])])
    finally:
        structlog.configure(processors=before)
    assert "fault" in places


# -- out of memory anywhere in the real runner --------------------------------------------------------------------------


POINTS = 80  # each way
SAMPLING = Sampling(max_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("late", [False, True])
async def test_memory_that_runs_out_anywhere_costs_nobody_his_output(
    model: Path, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has some 700 operations: one that failed is never the third in a row, after which a request would be given up.

    Random points of loading tables, copying blocks, the forward pass, sampling; `benchmarks.out_of_memory` does 1,000."""
    source = random.Random(1)
    points = wave = 0
    async with build_engine(small_engine(model)) as engine:
        monkeypatch.setattr(engine._runner, "_late", late)  # collected as on a GPU
        while points < POINTS:
            requests = make_wave(source, wave)
            async with running_out(engine, source, 1500, 5000) as mode:
                collected = await run_all(engine, requests)
            expected = await run_all(engine, [again(request) for request in requests])
            for name in collected:
                assert collected[name].tokens == expected[f"{name} again"].tokens, collected[name].last
            stats = await engine.stats()
            assert stats.blocks_used == 0
            assert stats.blocks_free + stats.blocks_cached == BLOCKS
            points += mode.points
            wave += 1


async def test_what_a_step_takes_over_is_done_once_memory_is_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy of a block fails before it is made. It is not planned again: later steps read what it should have written."""
    prompt, copied = [7, 8, 9] * 7, []  # it ends in the middle of a block, which samples share until they write
    samples = [EngineRequest((f"a{number}/0", f"a{number}/1"), [number, *prompt], SAMPLING) for number in range(4)]
    async with build_engine(small_engine(model)) as engine:
        expected = await run_all(engine, samples)
        pool = engine._runner.pool  # type: ignore[attr-defined]  # the real one
        copy = pool.copy

        def copies_at_the_second_try(pairs: list[tuple[int, int]]) -> None:
            copied.append(pairs)
            if copied.count(pairs) % 2:
                raise MemoryError
            copy(pairs)

        monkeypatch.setattr(pool, "copy", copies_at_the_second_try)
        renamed = [EngineRequest((f"b{number}/0", f"b{number}/1"), [number, *prompt], SAMPLING) for number in range(4)]
        found = await run_all(engine, renamed)
    assert copied, "nothing was copied"
    assert {name[1:]: one.tokens for name, one in found.items()} == {name[1:]: one.tokens for name, one in expected.items()}


# -- a lost device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [True, False])
async def test_after_the_loss_of_the_device_nothing_is_tried_and_every_stream_ends_once(look_ahead: bool) -> None:
    steps: list[int] = []

    def fault(step: Step, _names: list[str]) -> frozenset[str]:
        steps.append(step.id)
        if step.id == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return frozenset()

    def resume() -> None:
        raise DeviceLostError("the device answers no more")

    async with integer_engine(look_ahead=look_ahead, max_num_seqs=4) as (engine, runner):
        runner.fault = fault
        runner.resume = resume  # type: ignore[method-assign]  # the probe finds it lost
        reader = Reader(engine)  # refuses an output after the last one
        names = [f"r{number}" for number in range(6)]  # two of them wait
        for name in names:
            await engine.submit(ask(name, [1, 2, 3], 50))
        await reader.ended()
        with pytest.raises(DrainingError):
            await engine.submit(ask("late", [1]))
        await asyncio.sleep(0)
    assert {name: reader.requests[name].last.error for name in names} == dict.fromkeys(
        names, ("engine_lost", "the engine failed")
    )
    assert steps == [0, 1, 2, 3]

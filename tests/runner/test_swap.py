"""Blocks of preempted requests move to the host and back, in a real engine: no token changes, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec
from streamkv.backend_registry import load_backend
from streamkv.core.step import Step
from streamkv.engine.api import EngineRequest, EngineStats
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.errors import BackendError, ConfigError
from streamkv.runner.host_blocks import HostBlocks
from streamkv.runner.loader import load_model
from streamkv.runner.model_runner import ModelRunner, SkippedStepError
from streamkv.sampling_params import Sampling
from streamkv_backends.torch_backend import TorchBackend
from tests.engine.driving import Collected, Reader, run_all
from tests.runner.tiny import VOCAB, save_tiny

BLOCK_BYTES = 3 * 2 * 2 * 32 * 16 * 4
"""Of the tiny model: layers, keys and values, heads, width, tokens of a block, bytes of a float32."""
CROWDED = {"num_blocks": 8, "max_num_batched_tokens": 64, "max_num_seqs": 8, "poison": True}
ALWAYS = {"swap_memory": 64 * BLOCK_BYTES, "swap_block_tokens": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def requests() -> list[EngineRequest]:
    """Greedy and seeded ones, some that begin alike, and more than the pool holds."""
    greedy, seeded = Sampling(max_tokens=24, temperature=0.0), Sampling(max_tokens=24, temperature=0.9, seed=5)
    prompts = [[(7 * index + place * place) % VOCAB for place in range(5 + 3 * index)] for index in range(5)]
    prompts += [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, index] for index in range(3)]
    return [EngineRequest((f"r{index}",), prompt, seeded if index % 3 else greedy) for index, prompt in enumerate(prompts)]


async def run(model: Path, **settings: object) -> tuple[dict[str, list[int]], EngineStats]:
    async with build_engine(EngineConfig(**({"model": str(model)} | settings))) as engine:  # type: ignore[arg-type]  # by name
        outputs = await run_all(engine, requests())
        stats = await engine.stats()
    assert (stats.blocks_used, stats.host_slots_used) == (0, 0)
    return {name: collected.tokens for name, collected in outputs.items()}, stats


@pytest.mark.parametrize("settings", [{}, {"look_ahead": False}, {"enable_prefix_caching": False}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
async def test_tokens_are_the_same_swapped_recomputed_and_with_room_for_all(
    backend: str, settings: dict[str, object], model: Path
) -> None:
    try:
        load_backend(backend)
    except BackendError as error:
        pytest.skip(error.message)
    settings = settings | {"backend": backend}
    roomy, stats = await run(model, num_blocks=200, **settings)
    assert stats.preemptions == 0
    recomputed, stats = await run(model, **CROWDED, **settings)
    assert (stats.preemptions > 0, stats.swapped_out) == (True, 0)
    swapped, stats = await run(model, **CROWDED, **ALWAYS, **settings)
    assert stats.swapped_out >= stats.swapped_in > 0
    assert swapped == recomputed == roomy


async def test_a_host_that_is_too_small_and_moves_that_cost_too_much_leave_computing(model: Path) -> None:
    for settings in ({"swap_memory": BLOCK_BYTES - 1, "swap_block_tokens": 0.0}, ALWAYS | {"swap_block_tokens": 1e9}):
        _, stats = await run(model, **CROWDED, **settings)
        assert stats.preemptions > 0
        assert (stats.swapped_out, stats.swapped_in) == (0, 0)


async def test_what_moving_costs_is_measured_at_start(model: Path) -> None:
    config = EngineConfig(model=str(model), num_blocks=24, swap_memory=8 * BLOCK_BYTES)
    async with build_engine(config) as engine:
        host = engine._scheduler.cache.host
        assert host.num_slots == 8
        assert 0 < host.block_tokens < float("inf")
    async with build_engine(EngineConfig(model=str(model), num_blocks=24)) as engine:
        assert engine._scheduler.cache.host.num_slots == 0, "beside a pool on the CPU the default is none"


async def test_who_is_cancelled_while_the_host_keeps_it_leaves_nothing(model: Path) -> None:
    config = EngineConfig(model=str(model), **CROWDED, **ALWAYS)  # type: ignore[arg-type]  # by name
    async with build_engine(config) as engine:
        reader = Reader(engine)
        for index in range(2):
            request = EngineRequest((f"s{index}",), [index] * 40, Sampling(max_tokens=9, temperature=0.0), credit=1)
            await engine.submit(request)
            await reader.tokens(f"s{index}", 1)
        await engine.submit(EngineRequest(("large",), [9] * 60, Sampling(max_tokens=8, temperature=0.0)))
        await reader.finished(["large"])
        kept = await engine.stats()
        assert kept.host_slots_used > 0
        preempted = [name for name in ("s0", "s1") if "preempted" in reader.requests[name].states]
        await engine.cancel(preempted[0])
        gone: dict[str, Collected] = await reader.finished(preempted[:1])
        assert gone[preempted[0]].last.finish_reason == "cancelled"
        assert (await engine.stats()).host_slots_used < kept.host_slots_used
        for name in ("s0", "s1"):
            await engine.credit(name, 9)
        await reader.finished(["s0", "s1"])
        stats = await engine.stats()
    assert (stats.blocks_used, stats.host_slots_used) == (0, 0)


def test_slots_hold_what_the_blocks_held_in_whatever_order() -> None:
    pool = TorchBackend().allocate_kv(KVSpec(8, 4, torch.float32, (LayerSpec(2, 1, 8, 1.0),) * 2))
    for block in range(8):
        pool.fill([block], block + 1.0)
    before = pool.read(list(range(8)))
    host = HostBlocks(pool, 5 * before.shape[1] + 3)
    assert host.num_slots == 5
    host.swap_out([(6, 1), (2, 2), (7, 4), (0, 0)])
    pool.fill(list(range(8)), 0.0)
    host.swap_in([(1, 4), (3, 0), (4, 1), (5, 2)])
    after = pool.read([1, 3, 4, 5])
    assert torch.equal(after, before[[7, 0, 6, 2]])
    assert not pool.read([0, 2, 6, 7]).any(), "a block that nobody named was written"


def test_failed_and_skipped_steps_move_blocks_too_in_the_order_that_a_step_says(model: Path) -> None:
    loaded, backend = load_model(model), TorchBackend()
    pool = backend.allocate_kv(KVSpec(8, 16, loaded.dtype, loaded.layers))
    for block in range(8):
        pool.fill([block], block + 1.0)
    before = pool.read(list(range(8)))

    def broken() -> None:
        raise RuntimeError("no pass today")

    host = HostBlocks(pool, 2 * BLOCK_BYTES)
    runner = ModelRunner(loaded, backend, pool, max_num_seqs=1, max_model_len=64, host=host, on_pass=broken, late=False)
    row = {"rows": [0], "starts": [0], "counts": [1], "samples": [0], "tokens": [5]}
    out = Step(0, 0.0, **row, tables=[(0, 0, (7,))], swap_out=[(2, 0), (3, 1)], clears=[2], copies=[(4, 3)])
    with pytest.raises(RuntimeError, match="no pass today"):
        runner.run(out, {})
    with pytest.raises(SkippedStepError):
        runner.run(Step(1, 0.0, **row, copies=[(5, 6)], swap_in=[(5, 0), (1, 1)]), {})
    expected = {1: before[3], 2: torch.zeros_like(before[2]), 3: before[4], 5: before[2], 6: before[5]}
    for block, content in expected.items():
        assert torch.equal(pool.read([block])[0], content), f"block {block}"


def test_a_move_that_fails_for_want_of_memory_is_made_before_the_next_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, backend = load_model(model), TorchBackend()
    pool = backend.allocate_kv(KVSpec(8, 16, loaded.dtype, loaded.layers))
    pool.fill([2], 3.0)
    before = pool.read([2])
    runner = ModelRunner(loaded, backend, pool, max_num_seqs=1, max_model_len=64, host=HostBlocks(pool, 2 * BLOCK_BYTES))
    row = {"rows": [0], "starts": [0], "counts": [1], "samples": [0], "tokens": [5], "tables": [(0, 0, (7,))]}

    def full(_block_ids: list[int]) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(pool, "read", full)
        with pytest.raises(MemoryError):
            runner.run(Step(0, 0.0, **row, swap_out=[(2, 0)], clears=[2]), {})
    runner.resume()
    runner.run(Step(1, 0.0, **row, swap_in=[(5, 0)]), {})
    assert torch.equal(pool.read([5]), before)
    assert not pool.read([2]).any()


def test_more_memory_than_there_is_is_refused_in_one_sentence() -> None:
    pool = TorchBackend().allocate_kv(KVSpec(1, 4, torch.float32, (LayerSpec(2, 1, 8, 1.0),)))
    with pytest.raises(ConfigError, match=r"GiB for swapped blocks cannot be allocated; give less, or 0"):
        HostBlocks(pool, 1 << 60)
    for settings in ({"swap_memory": -1}, {"swap_block_tokens": -0.5}, {"swap_block_tokens": float("nan")}):
        with pytest.raises(ConfigError, match="must be at least 0"):
            EngineConfig(**settings)

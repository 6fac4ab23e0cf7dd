"""Blocks of preempted requests move to the host and back through the cuda backend's pool: the tokens stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamkv.engine.api import EngineRequest, EngineStats
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import Sampling
from tests.engine.driving import run_all

EMULATED = {"backend": "cuda", "device": "emulated", "dtype": "float16", "max_model_len": 512, "max_num_seqs": 4}
SWAPPING = {"num_blocks": 7, "swap_memory": 64 << 20, "swap_block_tokens": 0.0}
PROMPTS = [[5 + index, *range(40, 70 + index)] for index in range(4)]
GREEDY = Sampling(max_tokens=24, temperature=0.0)


async def test_tokens_are_the_same_swapped(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMKV_CACHE", str(libraries))
    roomy, stats = await run(num_blocks=96)
    assert stats.preemptions == 0
    swapped, stats = await run(**SWAPPING)
    assert stats.swapped_in > 0
    assert stats.host_slots_used == 0
    assert swapped == roomy


async def run(**settings: int | float) -> tuple[list[list[int]], EngineStats]:
    requests = [EngineRequest((f"r{index}",), prompt, GREEDY) for index, prompt in enumerate(PROMPTS)]
    async with build_engine(EngineConfig(**EMULATED, **settings)) as engine:  # type: ignore[arg-type]  # by name
        outputs = await run_all(engine, requests)
        return [outputs[name].tokens for name in sorted(outputs)], await engine.stats()

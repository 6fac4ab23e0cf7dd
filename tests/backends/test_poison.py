"""The debug mode: fresh blocks hold NaN, so a backend that reads a slot nobody wrote is found by the first wrong token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec
from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import Sampling
from streamkv_backends.torch_backend import TorchBackend
from tests.engine.driving import Collected, run_all
from tests.runner.tiny import save_tiny

READS_TOO_FAR = "tests.backends.planted:ReadsOneSlotTooFar"
MAX_TOKENS = 12
# Block size 8: the first decodes into a second block, the second into a third; the last never leaves its first block.
PROMPTS = {"five": [11, 12, 13, 14, 15], "fourteen": list(range(40, 54)), "one": [9]}
BEFORE_A_NEW_BLOCK = {"five": 3, "fourteen": 2, "one": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


async def answers(model: Path, backend: str, *, poison: bool) -> dict[str, Collected]:
    requests = [
        EngineRequest((name,), prompt, Sampling(max_tokens=MAX_TOKENS, temperature=0.0)) for name, prompt in PROMPTS.items()
    ]
    config = EngineConfig(str(model), backend=backend, num_blocks=24, block_size=8, poison=poison)
    async with build_engine(config) as engine:
        return await run_all(engine, requests)


async def test_poison_changes_nothing_for_a_correct_backend(model: Path) -> None:
    plain = await answers(model, "torch", poison=False)
    poisoned = await answers(model, "torch", poison=True)
    assert {name: done.tokens for name, done in poisoned.items()} == {name: done.tokens for name, done in plain.items()}
    assert {done.last.finish_reason for done in poisoned.values()} == {"length"}


async def test_a_read_of_an_unwritten_slot_ends_the_request(model: Path) -> None:
    for name, done in (await answers(model, READS_TOO_FAR, poison=True)).items():
        assert done.last.finish_reason == "error", name
        assert done.last.error is not None
        assert done.last.error[0] == "numerical_error"
        assert len(done.tokens) <= BEFORE_A_NEW_BLOCK[name] + 1, "found as soon as a fresh block is in the table"


async def test_without_poison_the_same_fault_goes_unseen(model: Path) -> None:
    """Why the mode exists: the pool starts as zeros, and 0 times the stale value changes no token."""
    wrong = await answers(model, READS_TOO_FAR, poison=False)
    assert {done.last.finish_reason for done in wrong.values()} == {"length"}


async def test_blocks_of_a_new_request_are_poisoned_too(model: Path) -> None:
    request = EngineRequest(("r",), PROMPTS["five"], Sampling(max_tokens=2, temperature=0.0))
    async with build_engine(EngineConfig(str(model), backend=READS_TOO_FAR, num_blocks=24, block_size=8, poison=True)) as engine:
        done = (await run_all(engine, [request]))["r"]
    assert done.last.finish_reason == "error"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fill_poisons_and_clears_whole_blocks_in_every_layer(dtype: torch.dtype) -> None:
    layers = (LayerSpec(4, 2, 8, 1.0), LayerSpec(4, 1, 16, 1.0))
    pool = TorchBackend().allocate_kv(KVSpec(6, 8, dtype, layers))
    pool.fill([1, 4], float("nan"))
    for layer in range(len(layers)):
        by_block = pool.slots(layer).unflatten(1, (6, 8))  # [2, num_blocks, block_size, num_kv_heads, head_dim]
        assert by_block[:, [1, 4]].isnan().all()
        assert (by_block[:, [0, 2, 3, 5]] == 0).all()
    pool.fill([4], 0.0)
    assert (pool.slots(0).unflatten(1, (6, 8))[:, 4] == 0).all()
    assert pool.slots(1).unflatten(1, (6, 8))[:, 1].isnan().all()

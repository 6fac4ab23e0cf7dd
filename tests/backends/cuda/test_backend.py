"""The cuda backend keeps the contract, its kernels emulated: all cases in one dtype and head_dim, some of each other.

`make contract-cuda` runs all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv.errors import BackendError, ConfigError
from streamkv.runner.loader import load_model
from streamkv_backends.contract import Case, cases, check, check_refusals
from streamkv_backends.cuda.backend import CudaBackend
from streamkv_kernels.emulated import EmulatedDevice
from tests.runner.tiny import save_tiny

LIMITS = CudaBackend("emulated").limits
ALL = cases(LIMITS)
CHOSEN = [case for case in ALL if case.dtype is torch.float16 and (case.layers[0].head_dim == 64 or case.block_size == 16)]
CHOSEN += [case for case in ALL if case.dtype is torch.bfloat16 and "mixed, plain, head_dim 64, blocks of 16" in case.name]


@pytest.fixture(scope="module")
def backend(libraries: Path) -> CudaBackend:
    """One for all cases, as an engine has one for all its life; kernels are compiled once."""
    return CudaBackend("emulated", kernels=EmulatedDevice(cache=libraries))


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_keeps_the_contract(backend: CudaBackend, case: Case) -> None:
    check(backend, case)


def test_the_checked_build_finds_nothing_in_it(libraries: Path) -> None:
    (case,) = [case for case in ALL if "float16, chunks and decodes mixed, plain, head_dim 64, blocks of 16" in case.name][:1]
    kernels = EmulatedDevice(checked=True, cache=libraries, optimize=1)
    check(CudaBackend("emulated", kernels=kernels), case)


def test_refuses_what_its_limits_exclude(backend: CudaBackend) -> None:
    check_refusals(backend)


def test_limits_are_those_of_16_bit_tensor_cores() -> None:
    assert LIMITS.device == "cpu"
    assert LIMITS.dtypes == {torch.float16, torch.bfloat16}
    assert all(size % 16 == 0 for size in LIMITS.block_sizes or ())


LAYER = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)


def step(query_lens: list[int], lengths: list[int]) -> StepTensors:
    """Sequence i has the blocks 4 i to 4 i + 3 of 16 tokens."""
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    pairs = list(zip(query_lens, lengths, strict=True))
    slots = [64 * i + position for i, (new, length) in enumerate(pairs) for position in range(length - new, length)]
    tables = torch.arange(4 * len(lengths), dtype=torch.int32).view(-1, 4)
    return StepTensors(starts.int(), torch.tensor(lengths, dtype=torch.int32), tables, torch.tensor(slots))


def inputs(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, heads, 64, generator=random).half() for heads in (4, 2, 2))


def test_a_step_that_was_prepared_before_another_is_still_right(backend: CudaBackend) -> None:
    spec = KVSpec(16, 16, torch.float16, (LAYER,))
    backend.allocate_kv(spec)
    first, second = step([5, 1], [5, 1]), step([20], [20])
    expected = backend.attend(*inputs(6), 0, backend.prepare(first))
    backend.allocate_kv(spec)
    held = backend.prepare(first)
    backend.prepare(second)
    assert torch.equal(backend.attend(*inputs(6), 0, held), expected)


def test_more_sequences_than_there_was_room_for(backend: CudaBackend) -> None:
    count = 100
    backend.allocate_kv(KVSpec(4 * count, 16, torch.float16, (LAYER,)))
    metadata = backend.prepare(step([1] * count, [1] * count))
    query, key, value = inputs(count)
    output = backend.attend(query, key, value, 0, metadata)
    assert torch.equal(output, value.repeat_interleave(2, dim=1)), "one token sees itself only"


def test_the_pool_has_a_block_in_one_piece(backend: CudaBackend) -> None:
    pool = backend.allocate_kv(KVSpec(3, 16, torch.float16, (LAYER, replace(LAYER, num_kv_heads=1))))
    assert pool.blocks.shape == (3, 2 * 16 * 64 * 3)
    assert pool.blocks.is_contiguous()
    assert [cache.keys.shape for cache in pool.caches] == [(3, 2, 16, 64), (3, 1, 16, 64)]
    pool.caches[1].values[2] = 7
    assert pool.read([2]).view(torch.float16).sum() == 7 * 16 * 64
    assert not pool.read([0, 1]).any()


def test_quantised_weights_are_refused_in_a_sentence(backend: CudaBackend) -> None:
    with pytest.raises(ConfigError, match="quantization int8 needs the cpu backend"):
        backend.ops.linear(torch.nn.Linear(16, 16).half(), "int8")


@pytest.mark.parametrize("device", ["cpu", "emulate", "mps", ""])
def test_other_devices_are_refused_in_a_sentence(device: str) -> None:
    with pytest.raises(BackendError, match=r"the cuda backend runs on a GPU, not on .*; use --device cuda, or emulated"):
        CudaBackend(device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_functions_are_there_in_both_short_types(backend: CudaBackend, dtype: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path), dtype=dtype, ops=backend.ops)
    assert "LlamaRMSNorm" not in {type(module).__name__ for module in model.module.modules()}
    backend.allocate_kv(KVSpec(2, 16, model.dtype, (LAYER,)))
    assert backend.ops.dtype is model.dtype

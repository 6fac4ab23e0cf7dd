"""The pool moves whole blocks in few launches, however many layers there are, and in parts when there are many blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec
from streamkv_backends.cuda.pool import CudaKVPool
from streamkv_kernels.emulated import EmulatedDevice
from tests.backends.cuda.listening import Listening

LAYER = LayerSpec(4, 2, 64, scale=0.125)
SPEC = KVSpec(9, 16, torch.bfloat16, (LAYER, replace(LAYER, num_kv_heads=1), LAYER))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def listening(libraries: Path) -> Listening:
    return Listening(EmulatedDevice(cache=libraries))


def numbered(listening: Listening, gathered: int = 1 << 20) -> CudaKVPool:
    """A pool where every block holds its own number, in all layers."""
    pool = CudaKVPool(SPEC, CPU, listening, gathered=gathered)
    pool.blocks.copy_(torch.arange(9.0)[:, None].expand_as(pool.blocks))
    listening.take()
    return pool


def held(pool: CudaKVPool) -> list[float]:
    assert all((cache.keys == cache.keys[:, :1, :1, :1]).all() for cache in pool.caches)
    assert all(torch.equal(cache.values[:, 0, 0, 0], pool.caches[0].keys[:, 0, 0, 0]) for cache in pool.caches)
    return pool.blocks[:, 0].tolist()


def test_a_call_is_one_launch_for_all_layers(listening: Listening) -> None:
    pool = numbered(listening)
    data = pool.read([8, 2, 5])
    assert data.shape == (3, SPEC.bytes_per_block)
    pool.write([0, 1, 2], data)
    pool.copy([(8, 3), (7, 4)])
    pool.fill([6, 7], 0.5)
    assert held(pool) == [8, 2, 5, 8, 7, 5, 0.5, 0.5, 8]
    assert [launch.name for launch in listening.take()] == ["copy_blocks"] * 3 + ["fill_blocks"]


@pytest.mark.parametrize(("parts", "launches"), [(1, 5), (2, 3), (4, 2), (5, 1)])
def test_many_blocks_go_in_parts(listening: Listening, parts: int, launches: int) -> None:
    pool = numbered(listening, gathered=parts * SPEC.bytes_per_block + 1)
    data = pool.read([8, 2, 5, 2, 1])
    assert len(listening.take()) == launches
    assert data.view(torch.bfloat16)[:, -1].tolist() == [8, 2, 5, 2, 1]
    pool.write([0, 3, 7, 4, 6], data)
    assert len(listening.take()) == launches
    assert held(pool) == [8, 1, 2, 2, 2, 5, 1, 5, 8]


@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("inf")])
def test_filled_with_any_number_of_the_dtype(listening: Listening, value: float) -> None:
    pool = numbered(listening)
    pool.fill([3, 8], value)
    expected = torch.arange(9.0)[:, None].repeat(1, pool.blocks.shape[1])
    expected[[3, 8]] = value
    assert torch.equal(pool.blocks.float().nan_to_num(99.0), expected.nan_to_num(99.0))


def test_a_block_that_is_none_is_refused_before_anything_is_written(listening: Listening) -> None:
    pool = numbered(listening)
    with pytest.raises(ValueError, match="block 9 of a pool of 9"):
        pool.copy([(1, 2), (3, 9)])
    with pytest.raises(ValueError, match="block -1"):
        pool.fill([2, -1], 0.0)
    assert held(pool) == list(range(9))

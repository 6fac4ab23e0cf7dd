"""Batches to time: one big random memory, seen as the pool of as many layers as it takes to keep the cache from helping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.machine import Machine
from streamkv_kernels.attention import AttentionSpec
from streamkv_kernels.kv_write import LayerCache

__all__ = ["Batch", "Layout", "make_batch"]

Layout = Literal["block first", "layer first"]

_COLD: Final = 512e6
"""Bytes that all layers of a batch read together at least: ten times the cache of a large GPU."""
_MOST_LAYERS: Final = 64


@dataclass(frozen=True)
class Batch:
    """A step.

    Attributes:
        spec: of its layers.
        query, out: [num_tokens, num_heads, head_dim].
        caches: one a layer, all of the same blocks.
        tables: [num_seqs, max_blocks] on the device.
        query_start, seq_lens: [num_seqs + 1], [num_seqs].
    """

    spec: AttentionSpec
    query: torch.Tensor
    out: torch.Tensor
    caches: list[LayerCache]
    tables: torch.Tensor
    query_start: NDArray[np.int32]
    seq_lens: NDArray[np.int32]


def make_batch(
    machine: Machine,
    spec: AttentionSpec,
    lengths: list[tuple[int, int]],
    block_size: int,
    *,
    layout: Layout = "block first",
    shuffled: bool = True,
    max_layers: int = _MOST_LAYERS,
) -> Batch:
    """Make one.

    Args:
        lengths: (new tokens, tokens before them) of each sequence.
        layout: where the blocks of a layer lie.
        shuffled: the order of blocks is random, as in a pool that has lived; else they lie in a row.
        max_layers: fewer than it takes to keep the cache out; for shapes that are bound by arithmetic.
    """
    new = np.array([count for count, _ in lengths], dtype=np.int32)
    seq_lens = new + np.array([context for _, context in lengths], dtype=np.int32)
    needed = -(-seq_lens // block_size)
    num_blocks = int(needed.sum())
    per_block = 2 * spec.num_kv_heads * block_size * spec.head_dim
    layer_bytes = num_blocks * per_block * spec.cache_dtype.itemsize
    layers = max(1, min(max_layers, int(_COLD // layer_bytes) + 1)) if not machine.tiny else 2
    while layers > 1 and not machine.fits(1.1 * layers * layer_bytes):
        layers -= 1
    numbers = _numbers(spec.cache_dtype, num_blocks * layers * per_block, machine.place)
    shape = (2, spec.num_kv_heads, block_size, spec.head_dim)
    if layout == "block first":
        pool = numbers.view(num_blocks, layers, *shape).transpose(0, 1)
    else:
        pool = numbers.view(layers, num_blocks, *shape)
    scales: tuple[torch.Tensor, ...] = ()
    if spec.cache_dtype.itemsize == 1:
        scales = (_scales(pool[0, :, 0]), _scales(pool[0, :, 1]))
    caches = [LayerCache(pool[layer, :, 0], pool[layer, :, 1], *scales) for layer in range(layers)]
    order = np.random.default_rng(0).permutation(num_blocks) if shuffled else np.arange(num_blocks)
    tables = np.zeros((len(lengths), int(needed.max())), dtype=np.int32)
    tables[np.arange(tables.shape[1]) < needed[:, None]] = order
    query = torch.randn(int(new.sum()), spec.num_heads, spec.head_dim, device=machine.place).to(spec.dtype)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    placed = torch.from_numpy(tables).to(machine.place)
    return Batch(spec, query, torch.empty_like(query), caches, placed, starts, seq_lens)


def _numbers(dtype: torch.dtype, count: int, place: torch.device) -> torch.Tensor:
    """Random, of about 1 in bf16 and f16; any but NaN in 8 bits."""
    if dtype.itemsize == 2:
        return torch.empty(count, dtype=dtype, device=place).normal_()
    codes = torch.empty(count, dtype=torch.int8, device=place).random_(-120, 120)  # no e4m3 NaN among them
    return codes.view(dtype)


def _scales(keys: torch.Tensor) -> torch.Tensor:
    return torch.full(keys.shape[:3], 0.01, device=keys.device)

"""The KV pool of the cuda backend: block first, so that a block of all layers is one piece of memory.

    pool    [num_blocks, layer, 2, num_kv_heads, block_size, head_dim] of one dtype; layers may be unlike

A (block, head) tile is contiguous, as the kernels load it. Whole blocks are moved by launches over any number of them
(`blocks.cu`); between GPU and host they go through pinned memory, gathered first: one copy of many megabytes, not one a block.
Everything keeps to the order of torch's current stream, and only `read` waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch

from streamkv.attention import KVSpec
from streamkv_backends.tensor_pool import zeroed
from streamkv_kernels.blocks import BlockMover, Pieces
from streamkv_kernels.device import Device
from streamkv_kernels.kv_write import LayerCache
from streamkv_kernels.uploads import upload

__all__ = ["CudaKVPool"]

_GATHERED: Final = 64 << 20
"""Bytes on the GPU beside the pool, which was given nearly all of its memory."""


class CudaKVPool:
    """All blocks, one tensor for all layers."""

    def __init__(self, spec: KVSpec, place: torch.device, kernels: Device, *, gathered: int = _GATHERED) -> None:
        """Allocate, zeroed.

        Args:
            gathered: bytes that are gathered at a time; at least one block is.

        Raises:
            BackendError: memory is short, or the kernels cannot be compiled.
        """
        shapes = [(2, layer.num_kv_heads, spec.block_size, layer.head_dim) for layer in spec.layers]
        (self.blocks,) = zeroed(spec, place, [(spec.num_blocks, sum(map(math.prod, shapes)))])
        self.caches: list[LayerCache] = []
        """Views of each layer's keys and values."""
        begin = 0
        for shape in shapes:
            part = self.blocks[:, begin : begin + math.prod(shape)].view(spec.num_blocks, *shape)
            self.caches.append(LayerCache(part[:, 0], part[:, 1]))
            begin += math.prod(shape)
        self._spec, self._place = spec, place
        size = spec.bytes_per_block
        self._mover = BlockMover(kernels, self.blocks.view(-1).view(torch.uint8), Pieces(size, 1, size, size))
        self._at_a_time = max(1, gathered // size)

    @property
    def spec(self) -> KVSpec:
        """What was allocated."""
        return self._spec

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination); all sources are read before any destination is written."""
        self._mover.copy(pairs)

    def read(self, block_ids: list[int]) -> torch.Tensor:
        """[len(block_ids), bytes_per_block] uint8 on the CPU, pinned if there is a GPU: then `write` copies straight from it."""
        data = self.begin_read(block_ids)
        if self._place.type == "cuda":
            torch.cuda.current_stream(self._place).synchronize()
        return data

    def begin_read(self, block_ids: list[int], data: torch.Tensor | None = None) -> torch.Tensor:
        """As `read`, but nobody waits: a later `write` finds the blocks in it, the host only when the stream has come so far.

        Args:
            data: [len(block_ids), bytes_per_block] where they go, pinned if there is a GPU; None = somewhere new.
        """
        if data is None:
            shape = (len(block_ids), self._spec.bytes_per_block)
            data = torch.empty(shape, dtype=torch.uint8, pin_memory=self._place.type == "cuda")
        for part in self._parts(len(block_ids)):
            data[part].copy_(self._mover.gather(block_ids[part]), non_blocking=True)
        return data

    def write(self, block_ids: list[int], data: torch.Tensor) -> None:
        """Inverse of `read`; no block twice. `data` may be overwritten at once, if it is not pinned."""
        for part in self._parts(len(block_ids)):
            gathered = torch.empty(data[part].shape, dtype=torch.uint8, device=self._place)
            upload(gathered, data[part])
            self._mover.scatter(block_ids[part], gathered)

    def fill(self, block_ids: list[int], value: float) -> None:
        """Fill whole blocks with one value."""
        numbers = torch.full((4 // self._spec.dtype.itemsize,), value, dtype=self._spec.dtype)
        self._mover.fill(block_ids, int(numbers.view(torch.int32)) % 2**32)

    def _parts(self, count: int) -> Iterator[slice]:
        for first in range(0, count, self._at_a_time):
            yield slice(first, first + self._at_a_time)

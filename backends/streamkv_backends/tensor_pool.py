"""A KV pool made of one tensor a layer: what all backends on torch tensors have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from streamkv.attention import KVSpec
from streamkv.errors import BackendError

__all__ = ["TensorPool", "zeroed"]


class TensorPool:
    """All blocks; every layer's tensor has the block as dimension `block_dim`."""

    def __init__(self, spec: KVSpec, device: torch.device, shapes: Sequence[tuple[int, ...]], block_dim: int) -> None:
        """Allocate, zeroed.

        Args:
            shapes: one a layer.

        Raises:
            BackendError: memory is short.
        """
        self._spec = spec
        self._device = device
        self._dim = block_dim
        self.layers = zeroed(spec, device, shapes)
        self._by_block = [tensor.movedim(block_dim, 0) for tensor in self.layers]  # views: [num_blocks, ...]

    @property
    def spec(self) -> KVSpec:
        """What was allocated."""
        return self._spec

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks; all sources of all layers are gathered before the first is written."""
        if not pairs:
            return
        sources, targets = self._index([source for source, _ in pairs]), self._index([target for _, target in pairs])
        gathered = [blocks[sources] for blocks in self._by_block]
        for blocks, new in zip(self._by_block, gathered, strict=True):
            blocks[targets] = new

    def read(self, block_ids: list[int]) -> torch.Tensor:
        """[len(block_ids), num_bytes] uint8 on the CPU: layer after layer."""
        index = self._index(block_ids)
        parts = [blocks[index].flatten(1).contiguous().view(torch.uint8) for blocks in self._by_block]
        return torch.cat(parts, dim=1).cpu()

    def write(self, block_ids: list[int], data: torch.Tensor) -> None:
        """Inverse of `read`."""
        index, start = self._index(block_ids), 0
        for blocks in self._by_block:
            width = blocks[0].numel() * blocks.element_size()
            part = data[:, start : start + width].contiguous().view(blocks.dtype)
            blocks[index] = part.reshape(len(block_ids), *blocks.shape[1:]).to(self._device)
            start += width

    def fill(self, block_ids: list[int], value: float) -> None:
        """Fill whole blocks with one value."""
        index = self._index(block_ids)
        for blocks in self._by_block:
            blocks[index] = value

    def _index(self, block_ids: list[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.long, device=self._device)


def zeroed(spec: KVSpec, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """The tensors of a pool.

    Raises:
        BackendError: memory is short.
    """
    try:
        return [_zeros(shape, spec.dtype, device) for shape in shapes]
    except (RuntimeError, MemoryError) as error:
        size = spec.num_blocks * spec.bytes_per_block
        raise BackendError(f"{size / 2**30:.1f} GiB for {spec.num_blocks} KV blocks cannot be allocated; ask for less") from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that cost no time on the CPU: numpy asks the system for zeroed pages, torch would write every byte."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

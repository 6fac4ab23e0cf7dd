"""The KV pool of the cuda backend: block first, so that a block of all layers is one piece of memory.

    pool    [num_blocks, layer, 2, num_kv_heads, block_size, head_dim] of one dtype; layers may be unlike

A block moves between GPU and host in one copy, and a (block, head) tile is contiguous, as the kernels load it.
"""

from __future__ import annotations

import math

import torch

from streamkv.attention import KVSpec
from streamkv_backends.tensor_pool import TensorPool
from streamkv_kernels.kv_write import LayerCache

__all__ = ["CudaKVPool"]


class CudaKVPool(TensorPool):
    """All blocks, one tensor for all layers."""

    def __init__(self, spec: KVSpec, device: torch.device) -> None:
        """Allocate, zeroed.

        Raises:
            BackendError: memory is short.
        """
        shapes = [(2, layer.num_kv_heads, spec.block_size, layer.head_dim) for layer in spec.layers]
        super().__init__(spec, device, [(spec.num_blocks, sum(map(math.prod, shapes)))], block_dim=0)
        blocks, begin = self.layers[0], 0
        self.caches: list[LayerCache] = []
        """Views of each layer's keys and values."""
        for shape in shapes:
            part = blocks[:, begin : begin + math.prod(shape)].view(spec.num_blocks, *shape)
            self.caches.append(LayerCache(part[:, 0], part[:, 1]))
            begin += math.prod(shape)

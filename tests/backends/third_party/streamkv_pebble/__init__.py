"""A third party's attention backend for StreamKV: the smallest one that keeps the contract.

It is slow on purpose: every decision is one short method, so that it reads as the definition. Its layout is its own:

    pool        per layer [num_blocks, num_kv_heads, 2, block_size, head_dim]
"""

from __future__ import annotations

import torch

from streamkv.attention import KVSpec, LayerSpec, Limits, StepTensors
from streamkv.errors import BackendError

__all__ = ["PebbleBackend", "PebblePool"]


class PebblePool:
    """All blocks, one tensor a layer."""

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.layers = [
            torch.zeros((spec.num_blocks, layer.num_kv_heads, 2, spec.block_size, layer.head_dim), dtype=spec.dtype)
            for layer in spec.layers
        ]

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            sources, targets = map(list, zip(*pairs, strict=True))
            self.write(targets, self.read(sources))

    def read(self, block_ids: list[int]) -> torch.Tensor:
        return torch.cat([layer[block_ids].flatten(1).view(torch.uint8) for layer in self.layers], dim=1)

    def write(self, block_ids: list[int], data: torch.Tensor) -> None:
        widths = [layer[0].numel() * layer.itemsize for layer in self.layers]
        for layer, part in zip(self.layers, data.split(widths, dim=1), strict=True):
            layer[block_ids] = part.contiguous().view(layer.dtype).view(-1, *layer.shape[1:])

    def fill(self, block_ids: list[int], value: float) -> None:
        for layer in self.layers:
            layer[block_ids] = value


class PebbleBackend:
    """Attention one sequence at a time, in float32."""

    name = "pebble"
    ops = None

    def __init__(self, device: str = "auto") -> None:
        if device not in {"auto", "cpu"}:
            raise BackendError(f"pebble runs on the CPU, not on {device}")

    @property
    def limits(self) -> Limits:
        return Limits("cpu", frozenset({torch.float32, torch.bfloat16}), block_sizes=frozenset({8, 16, 32}))

    def allocate_kv(self, spec: KVSpec) -> PebblePool:
        refusal = self.limits.refusal(spec)
        if refusal is not None:
            raise BackendError(refusal)
        self.pool = PebblePool(spec)
        return self.pool

    def prepare(self, tensors: StepTensors) -> StepTensors:
        return tensors

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: StepTensors,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.store(layer, metadata.slots, key, value)
        spec = self.pool.spec.layers[layer]
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        starts = metadata.query_start.tolist()
        for index, length in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[index], starts[index + 1])
            if length:
                keys, values = self.load(layer, metadata.block_tables[index], length)
                output[rows] = self.attention(query[rows], keys, values, spec, sinks)
        return output

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        written = slots >= 0
        size = self.pool.spec.block_size
        block, offset = slots[written] // size, slots[written] % size
        self.pool.layers[layer][block, :, 0, offset] = key[written]
        self.pool.layers[layer][block, :, 1, offset] = value[written]

    def load(self, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, [num_kv_heads, length, head_dim]."""
        blocks = table[: -(-length // self.pool.spec.block_size)].long()
        both = self.pool.layers[layer][blocks].permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, num_kv_heads, slots, head_dim]
        return both[0, :, :length], both[1, :, :length]

    def attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: LayerSpec, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """[new, num_heads, head_dim]; the last new token is the last of the context."""
        context, new = keys.shape[1], len(query)
        heads = self.kv_heads(spec)
        scores = query.float().transpose(0, 1) @ keys[heads].float().transpose(1, 2)  # [num_heads, new, context]
        visible = self.visible(torch.arange(context - new, context)[:, None], torch.arange(context)[None], spec)
        scores = self.scores(scores, spec).masked_fill(~visible, -torch.inf)
        return (self.weights(scores, sinks) @ values[heads].float()).transpose(0, 1)

    def kv_heads(self, spec: LayerSpec) -> torch.Tensor:
        """Which KV head each query head reads."""
        return torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)

    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        seen = other <= token
        return seen if spec.window is None else seen & (other > token - spec.window)

    def scores(self, scores: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        scores = scores * spec.scale
        return scores if spec.soft_cap is None else spec.soft_cap * torch.tanh(scores / spec.soft_cap)

    def weights(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        if sinks is None:
            return torch.softmax(scores, dim=-1)
        extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]

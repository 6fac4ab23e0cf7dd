"""Host side of kv_write.cu: new keys and values into the pool, normed, rotated and quantised on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from streamkv_kernels.checks import TYPES, aligned, check, positive_multiple
from streamkv_kernels.device import Argument, Device, Kernel, Variant

__all__ = ["Angles", "KVWriter", "LayerCache", "Norms", "Rope", "rope_table"]

_IO: Final = (torch.bfloat16, torch.float16)
_QUANTISED: Final = (torch.float8_e4m3fn, torch.int8)
_WARPS: Final = 4


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer: views of the pool, [num_blocks, num_kv_heads, block_size, head_dim], with equal strides.

    Attributes:
        keys, values: bf16, f16, float8_e4m3fn or int8.
        key_scales, value_scales: float32 [num_blocks, num_kv_heads, block_size] of a cache with 8 bits, else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """See that the parts fit together.

        Raises:
            ValueError: they do not.
        """
        check("keys", self.keys, (*_IO, *_QUANTISED), [None] * 4, "dense")
        check("values", self.values, self.keys.dtype, self.keys.shape, "dense")
        if self.keys.stride() != self.values.stride():
            raise ValueError(f"keys have the strides {self.keys.stride()}, values {self.values.stride()}; they must be equal")
        if not aligned(self.keys, 4) or not aligned(self.values, 4):
            raise ValueError("rows of keys and values must begin at multiples of 4 bytes")
        scales = (self.key_scales, self.value_scales)
        if self.keys.dtype not in _QUANTISED:
            if scales != (None, None):
                raise ValueError(f"key_scales and value_scales belong to caches of 8 bits, not of {self.keys.dtype}")
            return
        if self.key_scales is None or self.value_scales is None:
            raise ValueError("a cache of 8 bits needs key_scales and value_scales")
        check("key_scales", self.key_scales, torch.float32, self.keys.shape[:3], "dense")
        check("value_scales", self.value_scales, torch.float32, self.keys.shape[:3], "dense")
        if self.key_scales.stride() != self.value_scales.stride():
            raise ValueError("key_scales and value_scales must have equal strides")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding.

    Attributes:
        cos, sin: float32 [num_positions, rotated / 2], of `rope_table`; `rotated` numbers of a head are turned.
        interleaved: neighbours are turned (GPT-J), else numbers half of the rotated part apart (Llama).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Angles:
    """Rotary embedding of halves of a head, rounded as transformers rounds.

    Attributes:
        cos, sin: [num_tokens, head_dim] in the dtype of the queries, contiguous; head_dim is a multiple of 8.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Norms:
    """Root mean square norms over the heads of queries and keys: x / sqrt(mean(x²) + eps) · (weight + offset).

    Attributes:
        query, key: weights, [head_dim].
    """

    query: torch.Tensor
    key: torch.Tensor
    eps: float
    offset: float = 0.0


def rope_table(inv_freq: torch.Tensor, num_positions: int, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions, float32 [num_positions, len(inv_freq)], computed in float64.

    Args:
        inv_freq: radians per position, as transformers' rope functions give them: llama3, yarn and longrope change these.
        scaling: factor on both (`attention_scaling` of yarn and longrope).
    """
    angles = torch.arange(num_positions, dtype=torch.float64, device=inv_freq.device)[:, None] * inv_freq.double()
    return (angles.cos() * scaling).float(), (angles.sin() * scaling).float()


class KVWriter:
    """The kernel for queries, keys and values of one dtype."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        """Nothing is compiled yet.

        Raises:
            ValueError: `dtype` is neither bfloat16 nor float16.
        """
        if dtype not in _IO:
            raise ValueError(f"dtype is {dtype}, and must be bfloat16 or float16")
        self._device, self._dtype = device, dtype
        self._kernels: dict[tuple[torch.dtype, int, int, int, bool], Kernel] = {}

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, cache: LayerCache) -> None:
        """Keys that are rotated already, and values, to their slots.

        Args:
            key, value: [num_tokens, num_kv_heads, head_dim], the last dimension dense.
            slots: [num_tokens] int64, block · block_size + offset; -1 = nowhere.

        Raises:
            ValueError: an argument does not fit; nothing is written.
        """
        self._launch(None, key, value, slots, cache, None, None, None)

    def rotate_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        cache: LayerCache,
        *,
        positions: torch.Tensor | None = None,
        rope: Rope | Angles | None = None,
        norms: Norms | None = None,
    ) -> torch.Tensor:
        """Norm, rotate, write.

        Args:
            query: [num_tokens, num_heads, head_dim], the last dimension dense.
            positions: [num_tokens] int64, rows of the rope's table; with a `Rope`.

        Returns:
            The queries, normed and rotated, contiguous. Those of tokens without slot hold anything.

        Raises:
            ValueError: an argument does not fit; nothing is written.
        """
        check("query", query, self._dtype, [*key.shape[:1], None, *key.shape[2:]], "dense")
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._launch(query, key, value, slots, cache, positions, rope, norms, out)
        return out

    def _launch(
        self,
        query: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        cache: LayerCache,
        positions: torch.Tensor | None,
        rope: Rope | Angles | None,
        norms: Norms | None,
        out: torch.Tensor | None = None,
    ) -> None:
        _, kv_heads, block_size, head_dim = cache.keys.shape
        num_tokens, heads = len(key), 0 if query is None else query.shape[1]
        positive_multiple("head_dim", head_dim, 4)
        check("key", key, self._dtype, [None, kv_heads, head_dim], "dense")
        check("value", value, self._dtype, key.shape, "dense")
        check("slots", slots, torch.int64, [num_tokens])
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor is not None and not aligned(tensor, 4):
                raise ValueError(f"heads of {name} must begin at multiples of 4 bytes")
        rotated = 0 if rope is None else self._check_rope(rope, positions, num_tokens, head_dim)
        if norms is not None:
            check("norms.query", norms.query, self._dtype, [head_dim])
            check("norms.key", norms.key, self._dtype, [head_dim])
        if not num_tokens:
            return
        style = 0 if rope is None else 3 if isinstance(rope, Angles) else 2 if rope.interleaved else 1
        kernel = self._kernel(cache.keys.dtype, head_dim, rotated, style, normed=norms is not None)
        all_heads = heads + 2 * kv_heads
        queries: tuple[Argument, ...] = (None, 0, 0) if query is None else (query, *query.stride()[:2])
        weights: tuple[Argument, ...] = (None, None, 0.0, 0.0)
        if norms is not None:
            weights = (norms.query, norms.key, norms.eps, norms.offset)
        table: tuple[Argument, ...] = (None, None, None) if rope is None else (rope.cos, rope.sin, positions)
        scales: tuple[Argument, ...] = (None, None, 0, 0)
        if cache.key_scales is not None:
            scales = (cache.key_scales, cache.value_scales, *cache.key_scales.stride()[:2])
        kernel.launch(
            (num_tokens, -(-all_heads // _WARPS), 1), (32 * _WARPS, 1, 1),
            *queries, key, *key.stride()[:2], value, *value.stride()[:2], heads, kv_heads,
            *weights, *table, out, slots, block_size,
            cache.keys, cache.values, *cache.keys.stride()[:3], *scales,
        )  # fmt: skip  # in the order of the kernel's parameters

    def _check_rope(self, rope: Rope | Angles, positions: torch.Tensor | None, num_tokens: int, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        if isinstance(rope, Angles):
            positive_multiple("head_dim", head_dim, 8)
            for name, angles in (("cos", rope.cos), ("sin", rope.sin)):
                check(f"rope.{name}", angles, self._dtype, [num_tokens, head_dim])
                if not aligned(angles, 4):
                    raise ValueError(f"rope.{name} must begin at a multiple of 4 bytes")
            return head_dim
        check("rope.cos", rope.cos, torch.float32, [None, None])
        check("rope.sin", rope.sin, torch.float32, rope.cos.shape)
        if positions is None:
            raise ValueError("positions must be given with rope")
        check("positions", positions, torch.int64, [num_tokens])
        rotated = 2 * rope.cos.shape[1]
        positive_multiple("twice the width of rope.cos", rotated, 4)
        if rotated > head_dim:
            raise ValueError(f"rope.cos is for {rotated} numbers of a head, which has {head_dim}")
        return rotated

    def _kernel(self, kv: torch.dtype, head_dim: int, rotated: int, style: int, *, normed: bool) -> Kernel:
        key = (kv, head_dim, rotated, style, normed)
        if key not in self._kernels:
            defines = (
                ("IO", TYPES[self._dtype]), ("KV", TYPES[kv]), ("HEAD_DIM", head_dim), ("ROT_DIM", rotated),
                ("ROPE", style), ("NORM", int(normed)),
            )  # fmt: skip  # one line a thought
            self._kernels[key] = self._device.kernel(Variant("kv_write", defines), "kv_write")
        return self._kernels[key]

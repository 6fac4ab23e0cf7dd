"""What wrappers of attention kernels share, as attention.cuh is what the kernels share; and the host side of attn_merge.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from streamkv_kernels.checks import TYPES, aligned, check, positive_multiple
from streamkv_kernels.device import Argument, Bound, Device, Grid, Variant
from streamkv_kernels.kv_write import LayerCache

__all__ = ["TILE", "AttentionSpec", "BoundLaunch", "MergeStates", "States", "attention_arguments", "output_arguments"]

TILE: Final = 16
"""Tokens of a tile, as in attention.cuh."""

_MERGE_WARPS: Final = 4
_IO: Final = (torch.bfloat16, torch.float16)
_QUANTISED: Final = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Facts of layers that are attended to alike.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the layers; head_dim is a multiple of 16.
        dtype: of queries and outputs, bfloat16 or float16.
        cache_dtype: of keys and values: `dtype`, float8_e4m3fn or int8.
        scale: factor on q·k.
        window: None = full attention; w = a token sees itself and the w - 1 tokens before it.
        soft_cap: None, or c: scores become c · tanh(score / c).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        """See that kernels exist for it.

        Raises:
            ValueError: they do not; the sentence names the field.
        """
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}, and must be a multiple of num_kv_heads, {self.num_kv_heads}")
        if self.head_dim % 16 or not 16 <= self.head_dim <= 256:
            raise ValueError(f"head_dim is {self.head_dim}, and must be a multiple of 16 up to 256")
        if self.dtype not in _IO:
            raise ValueError(f"dtype is {self.dtype}, and must be bfloat16 or float16")
        if self.cache_dtype not in (self.dtype, *_QUANTISED):
            raise ValueError(f"cache_dtype is {self.cache_dtype}, and must be {self.dtype}, float8_e4m3fn or int8")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, and must be positive")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap is {self.soft_cap}, and must be positive")

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def defines(self) -> tuple[tuple[str, int | str], ...]:
        """Macros of the kernels."""
        return (("HEAD_DIM", self.head_dim), ("IO", TYPES[self.dtype]), ("KV", TYPES[self.cache_dtype]))

    @property
    def tile_bytes(self) -> int:
        """Of shared memory that keys, values and scales of a tile take: STAGE_BYTES in attention.cuh."""
        item = self.cache_dtype.itemsize
        return 2 * TILE * (self.head_dim * item + (4 if item == 1 else 0))

    @property
    def scoring(self) -> tuple[float, float]:
        """`scale` and `cap` of the kernels, whose scores are in units of log 2."""
        if self.soft_cap is None:
            return self.scale * math.log2(math.e), 0.0
        return self.scale / self.soft_cap, self.soft_cap * math.log2(math.e)


@dataclass(frozen=True, slots=True)
class States:
    """Softmaxes of some tokens each, as kernels leave them for each other (State in attention.cuh).

    Attributes:
        out: [.., head_dim] float32, normalised.
        logarithms: [..] float32, log2 of the sums of 2^score.
    """

    out: torch.Tensor
    logarithms: torch.Tensor


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """A launch that can be repeated as long as its tensors live where they are."""

    bound: Bound
    grid: Grid
    block: Grid

    def launch(self) -> None:
        """Do it."""
        self.bound.launch(self.grid, self.block)


class MergeStates:
    """The kernel that joins states, into rows of one dtype; float32 makes states."""

    def __init__(self, device: Device, head_dim: int, dtype: torch.dtype) -> None:
        """Compile.

        Raises:
            BackendError: the kernel cannot be compiled.
        """
        self.head_dim, self.dtype = head_dim, dtype
        defines = (("HEAD_DIM", head_dim), ("IO", "f16"), ("KV", "f16"), ("OUT", TYPES[dtype]))
        self._kernel = device.kernel(Variant("attn_merge", defines), "attn_merge")

    def bind(
        self,
        states: States,
        merges: torch.Tensor,
        out: torch.Tensor,
        num_kv_heads: int,
        *,
        row_index: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        prefix: States | None = None,
        logarithms: torch.Tensor | None = None,
    ) -> BoundLaunch:
        """Check everything, and pack it for launches.

        Args:
            states: out [num_states, state_rows, head_dim], logarithms [num_states, state_rows].
            merges: [num_merges, 8] int32, as attn_merge.cu has it.
            out: [num_tokens, num_heads, head_dim], contiguous.
            row_index: int32, the token in `out` of each row that the merges count; None = the row itself.
            sinks, prefix, logarithms: `output_arguments`.

        Raises:
            ValueError: an argument does not fit; the sentence names it.
        """
        check("states.out", states.out, torch.float32, [None, None, self.head_dim])
        check("states.logarithms", states.logarithms, torch.float32, states.out.shape[:2])
        check("merges", merges, torch.int32, [None, 8])
        check("out", out, self.dtype, [None, None, self.head_dim])
        if row_index is not None:
            check("row_index", row_index, torch.int32, [None])
        outputs, state_rows = output_arguments(self.head_dim, out, sinks, prefix, logarithms), states.out.shape[1]
        bound = self._kernel.bind(
            states.out, states.logarithms, merges, row_index, *outputs, state_rows, out.shape[1], num_kv_heads
        )
        return BoundLaunch(bound, (len(merges), -(-state_rows // _MERGE_WARPS), 1), (32 * _MERGE_WARPS, 1, 1))


def attention_arguments(
    spec: AttentionSpec,
    query: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    plan: Sequence[torch.Tensor | None],
    outputs: Sequence[Argument],
    states: States,
    *,
    unit: int,
) -> tuple[Argument, ...]:
    """What attn_decode.cu and attn_prefill.cu take alike, in the order of their parameters.

    Args:
        query: [num_tokens, num_heads, head_dim], the last dimension dense, rows at multiples of `unit` bytes.
        cache: the layer's keys and values; their block size is a multiple of 16.
        block_tables: [num_seqs, max_blocks] int32.
        plan: what a kernel has between block tables and outputs, checked already.
        outputs: `output_arguments`.
        states: what pieces leave.

    Raises:
        ValueError: an argument does not fit; the sentence names it.
    """
    check("query", query, spec.dtype, [None, spec.num_heads, spec.head_dim], "dense")
    if not aligned(query, unit):
        raise ValueError(f"rows of query must begin at multiples of {unit} bytes")
    check("block_tables", block_tables, torch.int32, [None, None], "dense")
    pointers, strides = _cache_arguments(spec, cache)
    return (
        query, *pointers, block_tables, *plan, *outputs, states.out, states.logarithms,
        *query.stride()[:2], *strides, block_tables.stride(0), spec.num_heads, spec.num_kv_heads, spec.window or 0, *spec.scoring,
    )  # fmt: skip  # a line of pointers, one of numbers


def output_arguments(
    head_dim: int,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    prefix: States | None,
    logarithms: torch.Tensor | None,
) -> tuple[Argument, ...]:
    """`Output` of attention.cuh, but for the number of heads.

    Args:
        out: [num_tokens, num_heads, head_dim], checked already.
        sinks: [num_heads] float32: a logit for each head that joins the softmax with the value 0.
        prefix: [num_tokens, num_heads] states of tokens that were attended to elsewhere.
        logarithms: [num_tokens, num_heads] float32, gets log2 of each row's sum of 2^score, sinks and prefix included.

    Raises:
        ValueError: an argument does not fit; the sentence names it.
    """
    num_tokens, num_heads = out.shape[:2]
    if logarithms is not None:
        check("logarithms", logarithms, torch.float32, [num_tokens, num_heads])
    if sinks is not None:
        check("sinks", sinks, torch.float32, [num_heads])
    if prefix is None:
        return out, logarithms, sinks, None, None
    check("prefix.out", prefix.out, torch.float32, [num_tokens, num_heads, head_dim])
    check("prefix.logarithms", prefix.logarithms, torch.float32, [num_tokens, num_heads])
    return out, logarithms, sinks, prefix.out, prefix.logarithms


def _cache_arguments(spec: AttentionSpec, cache: LayerCache) -> tuple[tuple[Argument, ...], tuple[int, ...]]:
    """Pointers, then strides and block size, of `Cache` in attention.cuh.

    Raises:
        ValueError: the cache is none that the kernels can read.
    """
    check("keys", cache.keys, spec.cache_dtype, [None, spec.num_kv_heads, None, spec.head_dim], "dense")
    if not aligned(cache.keys) or not aligned(cache.values):
        raise ValueError("rows of keys and values must begin at multiples of 16 bytes")
    block_size = cache.keys.shape[2]
    positive_multiple("the block size of keys", block_size, TILE)
    pointers = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    strides = cache.keys.stride()[:3]
    if cache.key_scales is None or cache.value_scales is None:
        return pointers, (*strides, 0, 0, block_size)
    if not aligned(cache.key_scales) or not aligned(cache.value_scales):
        raise ValueError("rows of key_scales and value_scales must begin at multiples of 16 bytes")
    return pointers, (*strides, *cache.key_scales.stride()[:2], block_size)

"""A paged cache full of traps, and what attention over it must give: shared by the tests of decode and prefill.

Whatever no row may see is poison: NaN in free blocks, in slots past a sequence's end and before its window, in scales; ids of no
block in table entries; outputs are NaN before a launch. Nothing lies contiguous that need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from streamkv.attention import LayerSpec
from streamkv_backends.contract.judge import attention, relative_error
from streamkv_kernels.attention import AttentionSpec, States
from streamkv_kernels.kv_write import LayerCache

__all__ = ["QUANTISED", "Paged", "spec_of", "torch_states"]

NAN = float("nan")
ABSURD = (-1, 2**31 - 1)
QUANTISED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def spec_of(
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> AttentionSpec:
    return AttentionSpec(*heads, head_dim, dtype, cache_dtype or dtype, scale or head_dim**-0.5, window, soft_cap)


@dataclass
class Paged:
    """One step's batch.

    Attributes:
        spec: of the layer.
        lengths: (new tokens, tokens after the step) of each sequence.
        block_size: of the cache.
        size: of the numbers in the cache; scales of 8-bit caches shrink with it.
        spare_rows: rows after the last sequence's.
    """

    spec: AttentionSpec
    lengths: list[tuple[int, int]]
    block_size: int = 16
    seed: int = 0
    size: float = 1.0
    spare_rows: int = 1
    query: torch.Tensor = field(init=False)
    cache: LayerCache = field(init=False)
    block_tables: torch.Tensor = field(init=False)
    query_start: np.ndarray = field(init=False)
    seq_lens: np.ndarray = field(init=False)
    contexts: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        spec, random = self.spec, torch.Generator().manual_seed(self.seed)
        self.query_start = np.cumsum([0] + [new for new, _ in self.lengths]).astype(np.int32)
        self.seq_lens = np.array([length for _, length in self.lengths], dtype=np.int32)
        num_tokens = int(self.query_start[-1]) + self.spare_rows
        packed = torch.randn((num_tokens, spec.num_heads + 2, spec.head_dim), generator=random).to(spec.dtype)
        packed[int(self.query_start[-1]) :] = NAN
        self.query = packed[:, : spec.num_heads].mul_(2)  # scores of a few units, so that single tokens matter
        self._fill(random)

    def out(self) -> torch.Tensor:
        return torch.full(self.query.shape, NAN, dtype=self.spec.dtype)

    def rows(self, sequence: int) -> slice:
        return slice(int(self.query_start[sequence]), int(self.query_start[sequence + 1]))

    def visible_from(self, sequence: int) -> int:
        """The first token that any new one sees."""
        new, length = self.lengths[sequence]
        return 0 if self.spec.window is None else max(0, length - new + 1 - self.spec.window)

    def expected(self, sequence: int, dtype: torch.dtype, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Attention by its definition, in `dtype`."""
        spec = self.spec
        layer = LayerSpec(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale, spec.window, spec.soft_cap, sinks is not None
        )
        keys, values = self.contexts[sequence]
        return attention(self.query[self.rows(sequence)], keys, values, layer, sinks, dtype)

    def judge(self, out: torch.Tensor, sinks: torch.Tensor | None = None, chosen: list[int] | None = None) -> float:
        """Error over that of plain torch, at most 2 to be right; every other row must be untouched."""
        plain = own = 0.0
        left = torch.ones(len(out), dtype=torch.bool)
        for sequence in range(len(self.lengths)) if chosen is None else chosen:
            rows = self.rows(sequence)
            left[rows] = False
            if not self.lengths[sequence][0]:
                continue
            if self.lengths[sequence][1] == 0:
                assert bool((out[rows] == 0).all()), "rows of a sequence without tokens are not 0"
                continue
            exact = self.expected(sequence, torch.float64, sinks)
            assert bool(out[rows].isfinite().all()), f"sequence {sequence}: NaN or Inf"
            plain = max(plain, relative_error(self.expected(sequence, self.spec.dtype, sinks), exact))
            own = max(own, relative_error(out[rows], exact))
        assert bool(out[left].isnan().all()), "rows of nobody were written"
        return own / max(plain, torch.finfo(self.spec.dtype).eps / 2)

    def _fill(self, random: torch.Generator) -> None:
        spec, size, kv = self.spec, self.block_size, self.spec.cache_dtype
        needed = [-(-length // size) for _, length in self.lengths]
        num_blocks = sum(needed) + 3
        order = torch.randperm(num_blocks, generator=random).tolist()
        # [blocks, layers, keys and values, heads, block_size, head_dim], of which the middle layer is this one's
        pool = torch.full((num_blocks, 3, 2, spec.num_kv_heads, size, spec.head_dim), NAN).to(kv)
        scales = torch.full((num_blocks, 3, 2, spec.num_kv_heads, size), NAN)
        tables = torch.tensor(
            [[ABSURD[(row + column) % 2] for column in range(max(needed, default=0) + 1)] for row in range(len(needed))]
        )
        self.contexts = []
        for sequence, (_, length) in enumerate(self.lengths):
            blocks = [order.pop() for _ in range(needed[sequence])]
            first = self.visible_from(sequence)
            tables[sequence, first // size : len(blocks)] = torch.tensor(blocks[first // size :], dtype=torch.int64)
            numbers = torch.randn((2, length, spec.num_kv_heads, spec.head_dim), generator=random) * self.size
            codes, scale = _stored(numbers, kv)
            for token in range(first, length):
                slot = (blocks[token // size], 1, slice(None), slice(None), token % size)
                pool[slot] = codes[:, token]
                scales[slot] = scale[:, token]
            exact = codes.double() if kv not in QUANTISED else codes.double() * scale[..., None].double()
            self.contexts.append((exact[0], exact[1]))
        self.block_tables = tables.to(torch.int32)
        quantised = (scales[:, 1, 0], scales[:, 1, 1]) if kv in QUANTISED else (None, None)
        self.cache = LayerCache(pool[:, 1, 0], pool[:, 1, 1], *quantised)


def torch_states(batch: Paged, begins: np.ndarray) -> States:
    """By torch: the states of each sequence's tokens before `begins`; NaN where there are none."""
    spec = batch.spec
    out = torch.full((*batch.query.shape[:2], spec.head_dim), NAN)
    logarithms = torch.full(batch.query.shape[:2], NAN)
    for sequence, begin in enumerate(begins.tolist()):
        if begin:
            rows = batch.rows(sequence)
            keys, values = (part[:begin].repeat_interleave(spec.group, dim=1) for part in batch.contexts[sequence])
            scores = torch.einsum("nhd,chd->nhc", batch.query[rows].double(), keys.double()) * spec.scale
            out[rows] = torch.einsum("nhc,chd->nhd", scores.softmax(-1), values.double()).float()
            logarithms[rows] = (scores.logsumexp(-1) / math.log(2)).float()
    return States(out, logarithms)


def _stored(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [.., head_dim] and scales [..] of numbers as the cache holds them."""
    if dtype not in QUANTISED:
        return numbers.to(dtype), torch.ones(numbers.shape[:-1])
    scale = numbers.abs().amax(dim=-1) / QUANTISED[dtype]
    codes = numbers / scale[..., None]
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scale

"""A small split decode in Triton over the same paged cache, to compare with: what an afternoon gives without CUDA.

One program a (sequence, KV head, split of the tokens); the group's rows are padded to 16; a second kernel joins the splits.
Needs a GPU, or TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from streamkv_kernels.kv_write import LayerCache

__all__ = ["TritonDecode"]


@triton.jit
def _attend(
    query: Any, keys: Any, values: Any, tables: Any, lengths: Any, part: Any, logarithms: Any,
    scale: Any, block_stride: Any, head_stride: Any, row_stride: Any, table_stride: Any, split: Any,
    group: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr, step: tl.constexpr, num_rows: tl.constexpr,
) -> None:  # fmt: skip  # pointers, strides, constants
    sequence, head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    rows, columns = tl.arange(0, num_rows), tl.arange(0, dim)
    live = rows < group
    of = (sequence * tl.num_programs(1) + head) * group + rows
    q = tl.load(query + of[:, None] * dim + columns[None, :], mask=live[:, None], other=0.0)
    top = tl.full((num_rows,), float("-inf"), tl.float32)
    total = tl.zeros((num_rows,), tl.float32)
    out = tl.zeros((num_rows, dim), tl.float32)
    for first in range(number * split, tl.minimum((number + 1) * split, length), step):
        token = first + tl.arange(0, step)
        inside = token < length
        block = tl.load(tables + sequence * table_stride + token // block_size, mask=inside, other=0).to(tl.int64)
        base = block * block_stride + head * head_stride + (token % block_size) * row_stride
        k = tl.load(keys + base[None, :] + columns[:, None], mask=inside[None, :], other=0.0)
        score = tl.where(inside[None, :], tl.dot(q, k) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        v = tl.load(values + base[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
        out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v)
        total = total * fade + tl.sum(weight, 1)
        top = new_top
    place = of * tl.num_programs(2) + number
    tl.store(part + place[:, None] * dim + columns[None, :], out / tl.maximum(total, 1e-30)[:, None], mask=live[:, None])
    tl.store(logarithms + place, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=live)


@triton.jit
def _join(part: Any, logarithms: Any, out: Any, splits: Any, dim: tl.constexpr, most: tl.constexpr) -> None:
    row, number, columns = tl.program_id(0), tl.arange(0, most), tl.arange(0, dim)
    logarithm = tl.load(logarithms + row * splits + number, mask=number < splits, other=float("-inf"))
    weight = tl.exp2(logarithm - tl.max(logarithm, 0))
    parts = tl.load(part + (row * splits + number)[:, None] * dim + columns[None, :], mask=(number < splits)[:, None], other=0.0)
    total = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * dim + columns, total.to(out.dtype.element_ty))


class TritonDecode:
    """Splits as FlashDecoding does: as many as fill the device twice."""

    def __init__(self, query: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, num_kv_heads: int, num_sms: int) -> None:
        """For launches on these tensors; one new token a sequence, the last of `lengths` tokens."""
        seqs, heads, head_dim = query.shape
        longest = int(lengths.max())
        self.splits = max(1, min(-(-longest // 128), 2 * num_sms // (seqs * num_kv_heads)))
        self.split = -(-longest // self.splits // 64) * 64 if self.splits > 1 else longest
        self.splits = -(-longest // self.split)
        self.query, self.tables, self.lengths, self.num_kv_heads = query, tables, lengths, num_kv_heads
        self.part = torch.empty((seqs * heads, self.splits, head_dim), dtype=torch.float32, device=query.device)
        self.logarithms = torch.empty((seqs * heads, self.splits), dtype=torch.float32, device=query.device)
        self.out = torch.empty_like(query)

    def launch(self, cache: LayerCache) -> torch.Tensor:
        """Attend to one layer's cache."""
        seqs, heads, head_dim = self.query.shape
        group = heads // self.num_kv_heads
        _attend[(seqs, self.num_kv_heads, self.splits)](
            self.query, cache.keys, cache.values, self.tables, self.lengths, self.part, self.logarithms,
            head_dim**-0.5 * 1.4426950408889634, *cache.keys.stride()[:3], self.tables.stride(0), self.split,
            group=group, dim=head_dim, block_size=cache.keys.shape[2], step=64, num_rows=max(16, triton.next_power_of_2(group)),
        )  # fmt: skip  # in the order of the kernel's parameters
        most = triton.next_power_of_2(self.splits)
        _join[(seqs * heads,)](self.part, self.logarithms, self.out, self.splits, dim=head_dim, most=most)
        return self.out

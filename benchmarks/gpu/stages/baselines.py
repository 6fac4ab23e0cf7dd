"""Others at the same shapes, on the same device, in the same run.

SDPA and flex_attention get what they like best, contiguous keys and values of equal length; varlen_attn its own pages of 256;
FlashInfer and the small Triton kernel read the very cache that ours reads. Each must agree with ours before it is timed.
What is not installed, or refuses, says so in its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu.batch import Batch, make_batch
from benchmarks.gpu.machine import Call, Machine
from benchmarks.gpu.stage import Row
from benchmarks.gpu.stages.attention import decode_calls, prefill_calls, spec_of
from streamkv_kernels.attention import AttentionSpec

__all__ = ["baselines"]

_LAYERS = 4
_K = 1024


@dataclass(frozen=True)
class _Shape:
    """Sequences of equal length."""

    seqs: int
    new: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.seqs} × {self.new} new of {self.tokens}"


def baselines(machine: Machine) -> Iterator[Row]:
    """Microseconds of a layer, and how many times ours that is."""
    spec = spec_of((4, 2), 64) if machine.tiny else spec_of()
    decodes = (
        [_Shape(3, 1, 64)]
        if machine.tiny
        else [_Shape(16, 1, 4 * _K), _Shape(64, 1, 4 * _K), _Shape(256, 1, _K), _Shape(1, 1, 64 * _K)]
    )
    prefills = (
        [_Shape(1, 32, 32)] if machine.tiny else [_Shape(1, 2 * _K, 2 * _K), _Shape(1, 8 * _K, 8 * _K), _Shape(4, 2 * _K, 8 * _K)]
    )
    for shape in decodes + prefills:
        batch = make_batch(machine, spec, [(shape.new, shape.tokens - shape.new)] * shape.seqs, 16, max_layers=_LAYERS)
        own = (decode_calls if shape.new == 1 else prefill_calls)(machine, batch)
        own[0]()
        expected = batch.out.clone()
        ours = machine.seconds(own)
        yield _row(shape, "ours", ours, ours, "")
        for name, make in _OTHERS.items():
            try:
                calls = make(machine, batch, shape)
                note = _agreement(calls[0](), expected)
                seconds = machine.seconds(calls)
            except Exception as error:  # whatever a foreign package raises
                first = (str(error) or "refused").splitlines()[0]
                yield _row(shape, name, None, ours, f"{type(error).__name__}: {first}"[:120])
            else:
                yield _row(shape, name, seconds, ours, note)


def _row(shape: _Shape, name: str, seconds: float | None, ours: float | None, note: str) -> Row:
    times = None if seconds is None or ours is None else seconds / ours
    return {
        "shape": shape.name,
        "what": name,
        "µs": None if seconds is None else seconds * 1e6,
        "times ours": times,
        "note": note,
    }


def _agreement(result: torch.Tensor, expected: torch.Tensor) -> str:
    """Empty, or a complaint: a baseline that computes something else is no baseline."""
    difference = (result.float().reshape(expected.shape) - expected.float()).norm() / expected.float().norm()
    return "" if float(difference) < 0.02 else f"differs from ours by {float(difference):.2g}"


def _dense(batch: Batch, shape: _Shape, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [seqs, num_kv_heads, tokens, head_dim], contiguous."""
    cache, blocks = batch.caches[number], batch.tables[:, : shape.tokens // 16].long()
    parts = (
        part[blocks].transpose(1, 2).flatten(2, 3) for part in (cache.keys, cache.values)
    )  # of [seqs, blocks, heads, 16, dim]
    keys, values = (part.contiguous() for part in parts)
    return keys, values


def _query(batch: Batch, shape: _Shape) -> torch.Tensor:
    """[seqs, num_heads, new, head_dim]."""
    return batch.query.view(shape.seqs, shape.new, *batch.query.shape[1:]).transpose(1, 2)


def _back(function: Callable[..., torch.Tensor], *inputs: Any, **more: Any) -> torch.Tensor:
    return function(*inputs, **more).transpose(1, 2)


def _sdpa(_: Machine, batch: Batch, shape: _Shape) -> list[Call]:
    query, causal = _query(batch, shape), shape.new > 1
    if causal and shape.new < shape.tokens:
        raise ValueError("is_causal of SDPA is for chunks without a context")
    attend = partial(functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=True, scale=batch.spec.scale)
    return [partial(_back, attend, query, *_dense(batch, shape, number)) for number in range(len(batch.caches))]


def _flex(machine: Machine, batch: Batch, shape: _Shape) -> list[Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    context = shape.tokens - shape.new
    mask = create_block_mask(_causal(context), None, None, shape.new, shape.tokens, device=str(machine.place))
    compiled: Any = torch.compile(flex_attention, dynamic=False) if machine.timed else flex_attention
    attend = partial(compiled, block_mask=mask, enable_gqa=True, scale=batch.spec.scale)
    return [partial(_back, attend, _query(batch, shape), *_dense(batch, shape, number)) for number in range(len(batch.caches))]


def _causal(context: int) -> Callable[..., torch.Tensor]:
    def sees(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= query + context

    return sees


def _varlen(machine: Machine, batch: Batch, shape: _Shape) -> list[Call]:
    from torch.nn.attention.varlen import varlen_attn

    place, pages = machine.place, max(1, shape.tokens // 256)
    starts = torch.arange(shape.seqs + 1, dtype=torch.int32, device=place)
    query_start, key_start = starts * shape.new, starts * shape.tokens
    more: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    )
    paged = "block_table" in inspect.signature(varlen_attn).parameters and shape.tokens % 256 == 0
    more |= {"scale": batch.spec.scale, "enable_gqa": True}
    if paged:
        more |= {
            "block_table": torch.arange(shape.seqs * pages, dtype=torch.int32, device=place).view(shape.seqs, pages),
            "seqused_k": torch.full((shape.seqs,), shape.tokens, dtype=torch.int32, device=place),
        }
    calls: list[Call] = []
    for number in range(len(batch.caches)):
        parts = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in _dense(batch, shape, number))  # [tokens, heads, dim]
        keys, values = (part.view(-1, 256, *part.shape[1:]) if paged else part for part in parts)
        ends = (query_start, key_start, shape.new, shape.tokens)
        calls.append(partial(varlen_attn, batch.query, keys, values, *ends, **more))
    return calls


def _triton(machine: Machine, batch: Batch, shape: _Shape) -> list[Call]:
    from benchmarks.gpu.triton_decode import TritonDecode

    if shape.new > 1:
        raise ValueError("it only decodes")
    lengths = torch.from_numpy(batch.seq_lens).to(machine.place)
    kernel = TritonDecode(batch.query, batch.tables, lengths, batch.spec.num_kv_heads, machine.kernels.num_sms)
    return [partial(kernel.launch, cache) for cache in batch.caches]


def _flashinfer(machine: Machine, batch: Batch, shape: _Shape) -> list[Call]:
    import flashinfer  # type: ignore[import-not-found, unused-ignore]  # where it is installed

    spec: AttentionSpec = batch.spec
    place, pages = machine.place, -(-shape.tokens // 16)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=place)
    indptr = torch.from_numpy(np.arange(shape.seqs + 1, dtype=np.int32) * pages).to(place)
    last = torch.full((shape.seqs,), (shape.tokens - 1) % 16 + 1, dtype=torch.int32, device=place)
    table, kinds = batch.tables[:, :pages].flatten(), {"q_data_type": spec.dtype, "kv_data_type": spec.cache_dtype}
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim, 16)
    if shape.new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, table, last, *heads, **kinds)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        starts = torch.arange(shape.seqs + 1, dtype=torch.int32, device=place) * shape.new
        wrapper.plan(starts, indptr, table, last, *heads, causal=True, **kinds)
    return [partial(wrapper.run, batch.query, (cache.keys.contiguous(), cache.values.contiguous())) for cache in batch.caches]


_OTHERS: dict[str, Callable[[Machine, Batch, _Shape], list[Call]]] = {
    "SDPA, contiguous": _sdpa,
    "flex_attention, contiguous": _flex,
    "varlen_attn, pages of 256": _varlen,
    "Triton split decode": _triton,
    "FlashInfer": _flashinfer,
}

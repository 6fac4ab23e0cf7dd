"""Bugs planted in prefill attention, for planted.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from streamkv_kernels.attention import AttentionSpec
from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix
from streamkv_kernels.emulated import EmulatedDevice, Schedule
from tests.kernels.paged import NAN, Paged, spec_of
from tests.kernels.planted import Planted

__all__ = ["PLANTED", "check"]

# Chosen so that warps of a block end in different steps and windows begin where a step does. The longest is the last, where a
# table and the queries end, and comes in several pieces at 8 multiprocessors.
LENGTHS = [(1, 1), (17, 64), (2, 0), (34, 90), (1, 40), (9, 1100)]
SINKS = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, -1.0])


def check(device: EmulatedDevice) -> None:
    """The cheapest first: what is noticed there compiles one variant."""
    device = replace(device, num_sms=8, schedule=Schedule("random", seed=5))
    _judge(device, spec_of((6, 2)))
    _judge(device, spec_of((6, 2), window=84, soft_cap=20.0))
    _shared(device)
    if device.checked:
        return
    _judge(device, spec_of((6, 2), cache_dtype=torch.int8))
    _judge(replace(device, num_sms=1), spec_of((6, 2)), max_rows=128)


def _judge(device: EmulatedDevice, spec: AttentionSpec, max_rows: int = 64) -> None:
    batch = Paged(spec, LENGTHS, 32)
    prefill = PrefillAttention(device, spec, max_rows=max_rows)
    prefill.load(prefill.plan(np.diff(batch.query_start), batch.seq_lens))
    out, logarithms = batch.out(), torch.full((len(batch.query), spec.num_heads), NAN)
    start, lengths = torch.from_numpy(batch.query_start), torch.from_numpy(batch.seq_lens)
    prefill.launch(batch.query, batch.cache, batch.block_tables, start, lengths, out, sinks=SINKS, logarithms=logarithms)
    assert batch.judge(out, SINKS) <= 1
    key = batch.contexts[0][0][0].repeat_interleave(3, 0).double()  # of a row that sees one token
    score = (batch.query[0].double() * key).sum(-1) * spec.scale
    if spec.soft_cap is not None:
        score = spec.soft_cap * torch.tanh(score / spec.soft_cap)
    exact = torch.logaddexp(score, SINKS.double()) / np.log(2)
    assert torch.allclose(logarithms[0].double(), exact, atol=1e-4), "logarithms"
    counters = device.counters
    assert counters["ldmatrix_wavefronts"] == 4 * counters["ldmatrix"], "lanes wait for banks"


def _shared(device: EmulatedDevice) -> None:
    spec = spec_of((6, 2))
    batch = Paged(spec, [(1, 200), (3, 3), (40, 140)], 32)
    batch.block_tables[2, :3] = batch.block_tables[0, :3]
    for own, first in zip(batch.contexts[2], batch.contexts[0], strict=True):
        own[:96] = first[:96]
    shared = SharedPrefix(device, spec, max_rows=64)
    shared.load(shared.plan([([0, 2], 3)], batch.query_start, batch.block_tables.numpy(), 32))
    prefix = shared.launch(batch.query, batch.cache)
    prefill = PrefillAttention(device, spec, max_rows=64)
    prefill.load(prefill.plan(np.diff(batch.query_start), batch.seq_lens, prefix_lens=np.array([96, 0, 96])))
    out, start = batch.out(), torch.from_numpy(batch.query_start)
    prefill.launch(batch.query, batch.cache, batch.block_tables, start, torch.from_numpy(batch.seq_lens), out, prefix=prefix)
    assert batch.judge(out) <= 1


def _bug(name: str, old: str, new: str, says: str = "") -> Planted:
    return Planted(name, "attn_prefill.cu", old, new, "runtime" if says else "numbers", says)


def _hidden(name: str, old: str, new: str, says: str) -> Planted:
    return Planted(name, "attn_prefill.cu", old, new, "checked", says)


PLANTED = [
    # who sees what
    _bug(
        "a row sees the token after it",
        "position_of(limits, packed) + 1) : limits.end",
        "position_of(limits, packed) + 2) : limits.end",
    ),
    _bug("a window one token too wide", "- limits.window + 1)", "- limits.window)"),
    _bug(
        "masks for the last row only",
        "<= past_seen(limits, first_packed);",
        "<= past_seen(limits, first_packed + WARP_ROWS - 1);",
    ),
    _bug(
        "window masks for the first row only",
        "first_seen(limits, first_packed + WARP_ROWS - 1) &&",
        "first_seen(limits, first_packed) &&",
    ),
    _bug("a warp leaves before its last step", "from < warp_end &&", "from + TILE < warp_end &&"),
    _bug("a warp skips its first step", "from + PART * TILE > warp_begin", "from > warp_begin"),
    _bug("a shared prefix is causal", "limits.causal ?", "true ?"),
    # rows
    _bug("tokens and heads of packed rows swapped", "rows.start + packed / rows.group", "rows.start + packed % rows.group"),
    _bug("rows are not gathered", "rows.index ? rows.index[row] : row", "row"),
    _bug(
        "queries lie in the same banks", "return chunk_at<QUERY_CHUNKS>(row, chunk);", "return (row * QUERY_CHUNKS + chunk) * 16;"
    ),
    _hidden(
        "queries past the last row",
        "const bool inside = packed < rows.packed;",
        "const bool inside = true;",
        "none of its tensors",
    ),
    _hidden("outputs past the last row", "if (packed >= rows.packed) continue;", "", "none of its tensors"),
    _bug("a misaligned query", "step * 16 : query;", "step * 16 + 1 : query;", "misaligned"),
    # the ring
    _bug("the wait leaves a copy in flight", "cp_async_wait<0>();\n    sync_block();", "cp_async_wait<1>();\n    sync_block();"),
    _hidden("no barrier between a step and its copies", "    sync_block();  // this", "    // this", "race"),
    _bug(
        "a barrier that not all warps reach",
        "    sync_block();  // this",
        "    if (token < warp_end) sync_block();  // this",
        "divergence",
    ),
    _bug("the stage is not flipped", ", stage ^= 1)", ")"),
    _bug("the end with copies in flight", "  }\n  cp_async_wait<0>();\n", "  }\n", "in flight"),
    _bug("the block of the step before", "    block = block_of(ahead);  //", "    //"),
    _hidden(
        "a table entry past the end",
        "token < end ? table[token / (int)block_size] : 0",
        "table[token / (int)block_size]",
        "none of its tensors",
    ),
    _bug("tokens past the end are read", "kv_head, ahead, begin, end);", "kv_head, ahead, begin, end + 1);"),
    # softmax and output
    _bug("sinks are left out", "if (to_.sinks) whole", "if (false) whole"),
    _bug(
        "weights keep their own maximum",
        "ex2(part.top - (whole.top == NEG_INF ? 0.f : whole.top)) / whole.sum",
        "1.f / whole.sum",
    ),
    _bug("the prefix joins without its share", "two.x + other[0] * of_prefix", "two.x + other[0]"),
    _bug("logarithms without sinks", "to_.logarithms[row] = logarithm_of(whole);", "to_.logarithms[row] = logarithm_of(own);"),
    _bug("states of two KV heads in one place", "kv_head * piece.pieces) * ROWS", "kv_head) * ROWS"),
    _hidden("states of the wrong rows", "* ROWS + packed - piece.row;", "* ROWS + packed;", "none of its tensors"),
    # variants
    _bug("columns of 8-bit queries in the order of 16-bit ones", "      swap_query(a, b);\n", ""),
    _bug(
        "columns of 8-bit outputs swapped",
        "{softmax.out[accumulator][entry + half], softmax.out[accumulator + 1][entry + half]}",
        "{softmax.out[accumulator + half][entry], softmax.out[accumulator + half][entry + 1]}",
    ),
    _bug(
        "the weights of the first row tile for all",
        "scores[m][n], stage + n * STAGE_BYTES);\n#pragma",
        "scores[0][n], stage + n * STAGE_BYTES);\n#pragma",
    ),
    _bug(
        "the second part of a step is the first",
        "(stage * TILES + n) * STAGE_BYTES, first_row",
        "stage * TILES * STAGE_BYTES, first_row",
    ),
]

"""Bugs planted in decode attention, the merge of states, and what they share with prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from streamkv_kernels.emulated import EmulatedDevice, Schedule
from tests.kernels.paged import Paged, spec_of, torch_states
from tests.kernels.planted import Planted
from tests.kernels.ways import decode

__all__ = ["PLANTED", "check"]

# Drafts, padding, jobs in several pieces and shares that leave two states; with 6 : 2 heads a job has more than 8 rows.
LENGTHS: Final = [(1, 1), (3, 33), (5, 320), (1, 700), (1, 0), (2, 75)]
BEGINS: Final = np.array([0, 0, 64, 64, 0, 40], dtype=np.int32)  # of jobs in pieces and of a whole one; 40: within a tile


def check(device: EmulatedDevice) -> None:
    """Launch, and compare with float64.

    Raises:
        AssertionError: about numbers, or about turns of banks.
    """
    sinks = torch.linspace(-2.0, 3.0, 6)
    # 8 bits: their code is that of 16 and more. One variant, since most of the time goes into compiling; a second for what is
    # noticed only where heads are wide.
    for head_dim, window, soft_cap in ((64, None, None), (64, 70, 20.0), (256, None, None)):
        spec = spec_of((6, 2), head_dim, torch.bfloat16, torch.float8_e4m3fn, window=window, soft_cap=soft_cap)
        batch = Paged(spec, LENGTHS, 32)
        begins = BEGINS if window is None else np.zeros_like(BEGINS)
        prefix = torch_states(batch, begins)
        for schedule in (Schedule(), Schedule("newest", early_copies=True)):
            error = batch.judge(
                decode(replace(device, schedule=schedule), batch, begins=begins, sinks=sinks, prefix=prefix), sinks
            )
            assert error <= 1, f"the error is {error:.1f} times that of plain torch"


_DECODE: Final = "attn_decode.cu"
_SHARED: Final = "attention.cuh"
_MERGE: Final = "attn_merge.cu"

PLANTED: Final = (
    Planted(
        "other warps still read their rings",
        _DECODE,
        "    sync_block();  // the other warps still read their rings\n",
        "",
        "checked",
        "race",
    ),
    Planted(
        "states of warps are read before all are there",
        _DECODE,
        "    share_softmax(joint, softmax, piece.live);\n    sync_block();\n",
        "    share_softmax(joint, softmax, piece.live);\n",
        "checked",
        "race",
    ),
    Planted(
        "rings are filled while states are read",
        _DECODE,
        "    sync_block();  // before the rings are filled again\n",
        "",
        "checked",
        "race",
    ),
    Planted(
        "a barrier that some warps skip",
        _DECODE,
        "    sync_block();  // before the rings",
        "    if (threadIdx.x < 64) sync_block();  //",
        "runtime",
        "divergence",
    ),
    Planted(
        "a stage is used one copy early",
        _DECODE,
        "cp_async_wait<STAGES - 1>();",
        "cp_async_wait<STAGES>();",
        "runtime",
        "in flight",
    ),
    Planted(
        "lanes do not wait for each other's copies",
        _DECODE,
        "cp_async_wait<STAGES - 1>();\n    sync_warp();",
        "cp_async_wait<STAGES - 1>();",
        "checked",
        "race",
    ),
    Planted(
        "a stage is loaded while it is used",
        _DECODE,
        "    sync_warp();  // before the stage is loaded again\n",
        "",
        "checked",
        "race",
    ),
    Planted("the stage stays the first", _DECODE, "    stage = (stage + 1) % STAGES;\n", "", "numbers"),
    Planted(
        "a ring of one stage too many",
        _DECODE,
        "ring + stage * STAGE_BYTES, cache",
        "ring + (stage + 1) * STAGE_BYTES, cache",
        "runtime",
        "outside of",
    ),
    Planted(
        "the block of this tile for the next", _DECODE, "block = block_of(tile + WARPS);", "block = block_of(tile);", "numbers"
    ),
    Planted(
        "a table entry for each tile", _DECODE, "blocks[tile / tiles_per_block]", "blocks[tile]", "checked", "belong to none"
    ),
    Planted(
        "a new token does not see itself",
        _DECODE,
        "end[r] = s.end - s.rows + token + 1;",
        "end[r] = s.end - s.rows + token;",
        "numbers",
    ),
    Planted("new tokens see those after them", _DECODE, "end[r] = s.end - s.rows + token + 1;", "end[r] = s.end;", "numbers"),
    Planted(
        "a window one token too wide",
        _DECODE,
        "window > 0 ? end[r] - window : 0",
        "window > 0 ? end[r] - window - 1 : 0",
        "numbers",
    ),
    Planted(
        "tokens before the window are copied",
        _DECODE,
        "max(s.begin, window > 0 ? s.end - s.rows + 1 - (int)window : 0);",
        "s.begin;",
        "numbers",
    ),
    Planted("tokens of the prefix are seen again", _DECODE, "begin[r] = max(s.begin, ", "begin[r] = max(0, ", "numbers"),
    Planted("two states of a share in one place", _DECODE, "share.state + !piece.whole", "share.state", "numbers"),
    Planted(
        "rows that are not there are written",
        _DECODE,
        "min(16, s.rows * group - first_packed)",
        "16",
        "checked",
        "belong to none",
    ),
    Planted("rows 8-15 are rows 0-7", _DECODE, "query_row(lane / 4 + 8)", "query_row(lane / 4)", "numbers"),
    Planted(
        "queries of a wide head are read before all are there",
        _DECODE,
        "        sync_block();\n        attend(",
        "        attend(",
        "checked",
        "race",
    ),
    Planted(
        "queries of a wide head lie behind one ring", _DECODE, "shared + WARPS * RING_BYTES", "shared + RING_BYTES", "numbers"
    ),
    Planted("warps are joined without their maxima", _DECODE, "{sums[0], sums[1],", "{0.f, sums[1],", "numbers"),
    Planted("the prefix of whole jobs is left out", _DECODE, "result, piece.of.begin > 0", "result, false", "numbers"),
    Planted("chunks are not permuted", _SHARED, "(chunk ^ (row / (8 / spread) % spread))", "chunk", "numbers"),
    Planted(
        "keys and values past the end are copied",
        _SHARED,
        "const bool inside = token + row >= begin && token + row < end;\n    const i64 element = inside ? base",
        "const bool inside = token + row >= begin && token < end;\n    const i64 element = inside ? base",
        "numbers",
    ),
    Planted(
        "copies from an odd address",
        _SHARED,
        "chunk * (16 / (int)sizeof(KV)) : 0",
        "chunk * (16 / (int)sizeof(KV)) + 1 : 0",
        "runtime",
        "misaligned",
    ),
    Planted("one token too many is visible", _SHARED, "< (u32)rows.count[j / 2]", "<= (u32)rows.count[j / 2]", "numbers"),
    Planted(
        "a shuffle of half a warp",
        _SHARED,
        "    top = fmaxf(top, shfl_xor(top, 2));\n",
        "    if (lane_id() < 16) top = fmaxf(top, shfl_xor(top, 2));\n",
        "runtime",
        "divergence",
    ),
    Planted("outputs keep the old maximum", _SHARED, "      softmax.out[i][r * 2 + 1] *= shrink;\n", "", "numbers"),
    Planted(
        "-inf less -inf",
        _SHARED,
        "const float from = top == NEG_INF ? 0.f : top, shrink",
        "const float from = top, shrink",
        "numbers",
    ),
    Planted("value scales are key scales", _SHARED, "stage + 2 * TILE_BYTES + SCALE_BYTES", "stage + 2 * TILE_BYTES", "numbers"),
    Planted(
        "scales of a group that is not full stay away",
        _SHARED,
        "token + row + 3 >= begin && token + row < end",
        "token + row >= begin && token + row + 3 < end",
        "numbers",
    ),
    Planted("a scale of no token times 0", _SHARED, "if (QUANTISED && pair[j] != 0.f)", "if (QUANTISED)", "numbers"),
    Planted("columns of 8 bits in the order of 16", _SHARED, "j % 2 * 2 + i % 2", "i % 2 * 8 + j % 2", "numbers"),
    Planted("a sink in units of log 2", _SHARED, "{logit * LOG2_E, 1.f, 0.f}", "{logit, 1.f, 0.f}", "numbers"),
    Planted("states are joined as if they weighed the same", _MERGE, "state_of(logarithm, ", "state_of(0.f, ", "numbers"),
    Planted("the first state for all", _MERGE, "(merge[4] + piece) * state_rows", "merge[4] * state_rows", "numbers"),
    Planted("the prefix of split jobs is left out", _MERGE, "merge[6] != 0", "false", "numbers"),
    Planted("rows of the first KV head", _MERGE, "(i64)head * group + packed % group", "packed % group", "numbers"),
)

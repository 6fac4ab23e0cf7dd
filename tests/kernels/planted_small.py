"""Bugs planted in the small kernels: norms, activations, rotary embedding, KV writes, blocks, logits, sampling."""

from __future__ import annotations

from typing import Final

import torch

from streamkv_kernels.emulated import EmulatedDevice
from tests.kernels.planted import Planted
from tests.kernels.test_sample import counts_by_the_generator, cuts_show, follows_the_definition, weighs_as_exp
from tests.kernels.test_small_blocks import moves_as_the_model
from tests.kernels.test_small_kv import SHAPES, faults_reach_the_scale, turns_bit_by_bit_as_torch, writes_exactly
from tests.kernels.test_small_logits import CASES, changes_each, finds_faults, takes_the_first_of_the_largest, tells_logprobs
from tests.kernels.test_small_rows import gate_is_exact, norm_is_exact, norm_with_residual, rotates_as_torch

__all__ = ["PLANTED", "check"]

BF16: Final = torch.bfloat16


def check(device: EmulatedDevice) -> None:
    """The tests' own checks, on as few variants as will do: most of the time goes into compiling.

    Raises:
        AssertionError: about numbers.
    """
    # Logits first: a bug in a header has every variant compiled anew up to the one that shows it.
    takes_the_first_of_the_largest(device, BF16)
    finds_faults(device, BF16)
    for case in CASES:
        changes_each(device, case, BF16)
    tells_logprobs(device, BF16, 1.0)
    weighs_as_exp(device)
    counts_by_the_generator(device, [3, 2**32 + 1, 2**40 + 5])
    follows_the_definition(device, "all", count=3, vocab_size=1001)
    cuts_show(device)
    norm_is_exact(device, 1040, BF16, "Llama")
    norm_is_exact(device, 1040, BF16, "Gemma")
    norm_with_residual(device, 1040)
    gate_is_exact(device, "silu", BF16, 48)
    rotates_as_torch(device, 64, BF16)
    for layout in ("layer first", "a piece larger than a chunk, a layer apart"):
        moves_as_the_model(device, layout, [(0, 1), (1, 0), (2, 5)], [4, 2], 0x11223344)
    writes_exactly(device, SHAPES["part of a head, int8, norms of Gemma"])
    faults_reach_the_scale(device)
    turns_bit_by_bit_as_torch(device, 64, BF16)


ROWS: Final = (
    Planted("eps outside of the root", "norm.cu", "rsqrt(squares / (float)width + (float)eps)",
            "rsqrt(squares / (float)width) + (float)eps", "numbers"),
    Planted("a norm rounds in the other style", "norm.cu", "if (round_first)", "if (!round_first)", "numbers"),
    Planted("the sum is written and not normed", "norm.cu", "residual ? residual : x;", "x;", "numbers"),
    Planted("only the first warp's sum counts", "rows.cuh", "i < (int)blockDim.x / 32; i++) value",
            "i < 1; i++) value", "numbers"),
    Planted("no barrier before the warps' sums are read", "rows.cuh",
            "= value;\n  sync_block();\n  value = scratch[0];", "= value;\n  value = scratch[0];", "checked", "race"),
    Planted("no barrier before the scratch is used again", "rows.cuh", "  sync_block();\n  return value;", "  return value;",
            "checked", "race"),
    Planted("a sum lacks a step", "rows.cuh", "for (int mask = 16; mask; mask /= 2)", "for (int mask = 16; mask > 1; mask /= 2)",
            "numbers"),
    Planted("the activation is not rounded", "activation.cu", "rounded<IO>(activate(v.at[j]))", "activate(v.at[j])", "numbers"),
    Planted("threads beyond the row", "activation.cu", "  if (i >= width) return;\n", "", "checked", "none of its tensors"),
    Planted("turned the other way", "rotate.cu", "cos_a.at[j]) - rounded", "cos_a.at[j]) + rounded", "numbers"),
    Planted("the second half takes the first one's sine", "rotate.cu", "a.at[j] * sin_b.at[j]", "a.at[j] * sin_a.at[j]",
            "numbers"),
)  # fmt: skip  # a bug is a thought

BLOCKS: Final = (
    Planted("a piece is copied 16 bytes too far", "blocks.cu", "#pragma unroll 4\n  for (i64 i = begin + threadIdx.x * 16; i <",
            "#pragma unroll 4\n  for (i64 i = begin + threadIdx.x * 16; i <=", "checked", "none of its tensors"),
    Planted("ids are not looked up", "blocks.cu", "(ids ? ids[index] : index)", "index", "numbers"),
    Planted("every fourth word is not filled", "blocks.cu", "u32x4{{w, w, w, w}}", "u32x4{{w, w, w, 0u}}", "numbers"),
)  # fmt: skip  # a bug is a thought

KV: Final = (
    Planted("slot -1 is taken for an address", "kv_write.cu", "  if (slot < 0) return;\n", "", "checked", "none of its tensors"),
    Planted("halves of the head, not of what turns", "kv_write.cu", "2 * u + ROT_DIM / 2", "2 * u + HEAD_DIM / 2", "numbers"),
    Planted("values are rotated", "kv_write.cu", "if (ROPE && !is_v)", "if (ROPE)", "numbers"),
    Planted("the row in the batch for the position", "kv_write.cu", "positions[token] * ", "token * ", "numbers"),
    Planted("scales of values overwrite those of keys", "kv_write.cu", "(is_v ? value_scales : key_scales)", "key_scales",
            "numbers"),
    Planted("NaN is lost in the scale", "kv_write.cu", " + spoilt;", ";", "numbers"),
    Planted("half of a head decides on its scale", "kv_write.cu", "fmaxf(fabsf(units[i].a[j]), fabsf(units[i].b[j]))",
            "fabsf(units[i].a[j])", "numbers"),
    Planted("products are not rounded", "kv_write.cu", "rounded<IO>(a * cos_a[j])", "a * cos_a[j]", "numbers"),
    Planted("all tokens turn as the first", "kv_write.cu", "ROPE == 3 ? token * HEAD_DIM", "ROPE == 3 ? 0", "numbers"),
    Planted("the second half has the first one's cosine", "kv_write.cu", "load_pair(cos_b, cos + HEAD_DIM / 2)",
            "load_pair(cos_b, cos)", "numbers"),
    Planted("the row's stride for the head's", "kv_write.cu", "head * head_stride + row * row_stride",
            "head * row_stride + row * row_stride", "numbers"),
)  # fmt: skip  # a bug is a thought

LOGITS: Final = (
    Planted("rows are taken to begin at 16 bytes", "logits.cuh", "misaligned ? WIDE - misaligned : 0", "0",
            "runtime", "misaligned"),
    Planted("the last number of a row is left out", "logits.cuh", "+ worker; i < end; i += workers)",
            "+ worker; i < end - 1; i += workers)", "numbers"),
    Planted("-0 is less than 0", "logits.cuh", "x == 0.f ? 0u : bits_of(x)", "bits_of(x)", "numbers"),
    Planted("one coefficient of exp is wrong", "logits.cuh", "4.1665795894e-2f", "4.2e-2f", "numbers"),
    Planted("infinity is finite", "logits.cu", "bad += !is_finite(x);\n  });\n  best",
            "bad += x != x;\n  });\n  best", "numbers"),
    Planted("negative logits are divided", "logits.cu", "x = x < 0.f ?", "x = x > 0.f ?", "numbers"),
    Planted("bias and penalty at the same time", "logits.cu", "  sync_block();\n  each_listed(bias_start",
            "  each_listed(bias_start", "numbers"),
    Planted("the bits of other tokens", "logits.cu", ">> token % 32 & 1u", ">> (31 - token % 32) & 1u", "numbers"),
    Planted("equal logits worsen the rank", "logits.cu", "larger += x > chosen;", "larger += x >= chosen;", "numbers"),
)  # fmt: skip  # a bug is a thought

SAMPLE: Final = (
    Planted("one more than k", "sample.cu", "(u64)top_k[r], [](float)", "(u64)top_k[r] + 1, [](float)", "numbers"),
    Planted("p of the whole row, not of what top-k keeps", "sample.cu", "total += weight(x);",
            "total += weight_of(add_rn(x, -largest));", "numbers"),
    Planted("the target is reached one token early", "sample.cu", "if (sum < target && next >= target)",
            "if (sum <= target && next > target)", "numbers"),
    Planted("min-p is left out", "sample.cu", "  if (low < least_probable) low = least_probable;\n", "", "numbers"),
    Planted("a wrong constant in Philox", "sample.cu", "0xbb67ae85u", "0xbb67ae84u", "numbers"),
    Planted("the upper half of the position is left out", "sample.cu", "{(u32)position, (u32)(position >> 32),",
            "{(u32)position, 0u,", "numbers"),
    Planted("bins change without atomicity", "sample.cu", "atomic_add(&shared.bins[(key - lowest) >> shift], amount)",
            "shared.bins[(key - lowest) >> shift] += amount", "checked", "race"),
    Planted("no barrier between clearing and counting", "sample.cu", "shared.bins[i] = 0;\n    sync_block();",
            "shared.bins[i] = 0;", "checked", "race"),
    Planted("no barrier before the parts are added", "sample.cu", "shared.segment[warp] = sum;\n  sync_block();",
            "shared.segment[warp] = sum;", "checked", "race"),
    Planted("a shuffle that some lanes leave out", "sample.cu",
            "    const u64 other = shfl(sum, (lane - back) & 31);\n    if (lane >= back) sum += other;",
            "    if (lane >= back) sum += shfl(sum, (lane - back) & 31);", "runtime", "divergence"),
)  # fmt: skip  # a bug is a thought

PLANTED: Final = (*ROWS, *BLOCKS, *KV, *LOGITS, *SAMPLE)

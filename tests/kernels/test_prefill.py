"""Prefill and shared-prefix attention on the emulator against float64: no worse than plain torch in the same dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamkv_kernels.attention import States
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix
from streamkv_kernels.emulated import EmulatedDevice, Schedule
from streamkv_kernels.kv_write import LayerCache
from streamkv_kernels.prefill_plan import shared_prefixes
from tests.kernels.paged import NAN, Paged, spec_of

BF16, F16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8

# (new tokens, tokens): around tiles, spans and blocks; chunks on contexts; a single token; padding; several tiles of rows.
RAGGED = [(1, 1), (15, 15), (16, 17), (17, 64), (33, 65), (0, 9), (1, 130), (2, 0), (70, 200), (5, 16), (64, 128)]

DTYPES = [
    *((BF16, BF16, head_dim) for head_dim in (64, 80, 96, 128, 256)),
    *((F16, F16, head_dim) for head_dim in (64, 128)),
    *((BF16, E4M3, head_dim) for head_dim in (80, 128)),
    *((BF16, INT8, head_dim) for head_dim in (64, 256)),
    (F16, E4M3, 64),
    (F16, INT8, 96),
]


@pytest.fixture(scope="module")
def device(libraries: Path) -> EmulatedDevice:
    return EmulatedDevice(cache=libraries, optimize=1)


@pytest.fixture(scope="module")
def watched(libraries: Path) -> EmulatedDevice:
    return EmulatedDevice(cache=libraries, optimize=1, checked=True)


def tables_of(batch: Paged) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.block_tables, torch.from_numpy(batch.query_start), torch.from_numpy(batch.seq_lens)


def run(
    device: EmulatedDevice,
    batch: Paged,
    *,
    chosen: list[int] | None = None,
    prefix_lens: np.ndarray | None = None,
    max_rows: int = 64,
    out: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    prefill = PrefillAttention(device, batch.spec, max_rows=max_rows)
    mask = None if chosen is None else np.isin(np.arange(len(batch.lengths)), chosen)
    prefill.load(prefill.plan(np.diff(batch.query_start), batch.seq_lens, chosen=mask, prefix_lens=prefix_lens))
    out = batch.out() if out is None else out
    prefill.launch(batch.query, batch.cache, *tables_of(batch), out, **more)
    return out


@pytest.mark.parametrize(("dtype", "cache_dtype", "head_dim"), DTYPES, ids=str)
def test_dtypes_and_head_dims(device: EmulatedDevice, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    batch = Paged(spec_of((4, 2), head_dim, dtype, cache_dtype), RAGGED)
    assert batch.judge(run(device, batch)) <= 1
    assert device.counters["ldmatrix"] > 0
    assert device.counters["ldmatrix_wavefronts"] == 4 * device.counters["ldmatrix"], "lanes wait for banks"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_row_tiles_a_warp(device: EmulatedDevice, head_dim: int) -> None:
    batch = Paged(spec_of((4, 2), head_dim), [*RAGGED, (200, 300)])
    narrow, wide = (run(replace(device, num_sms=1), batch, max_rows=rows) for rows in (64, 128))
    assert batch.judge(wide) <= 1
    assert batch.judge(narrow) <= 1


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (14, 2), (8, 1), (20, 1)], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_groups_and_block_sizes(device: EmulatedDevice, heads: tuple[int, int], block_size: int) -> None:
    batch = Paged(spec_of(heads), [(1, 1), (40, 40), (9, 64), (30, 95)], block_size)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("window", [1, 5, 16, 17, 70, 4096])
@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(None, False), (2.0, True), (30.0, False)])
def test_windows_caps_and_sinks(device: EmulatedDevice, window: int, soft_cap: float | None, with_sinks: bool) -> None:
    batch = Paged(spec_of(window=window, soft_cap=soft_cap), RAGGED)
    sinks = torch.tensor([0.5, -3.0, 4.0, 30.0]) if with_sinks else None
    assert batch.judge(run(device, batch, sinks=sinks), sinks) <= 1


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_flat_and_sharp_scores(device: EmulatedDevice, scale: float) -> None:
    batch = Paged(spec_of(scale=scale), RAGGED)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("size", [1e-3, 1000.0])
def test_small_and_large_values_of_8_bits(device: EmulatedDevice, size: float) -> None:
    batch = Paged(spec_of((4, 2), 96, F16, INT8, scale=0.1 / size), RAGGED, size=size)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("window", [None, 900])
def test_a_long_context_in_pieces(device: EmulatedDevice, new: int, window: int | None) -> None:
    batch = Paged(spec_of((4, 2), window=window), [(new, 2500), (3, 10)])
    sinks = torch.tensor([0.5, -3.0, 4.0, 30.0])
    many = replace(device, num_sms=20)
    plan = PrefillAttention(many, batch.spec, max_rows=64).plan(np.diff(batch.query_start), batch.seq_lens)
    assert len(plan.merges) == 2  # a job for either KV head
    assert batch.judge(run(many, batch, sinks=sinks), sinks) <= 1


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
def test_the_same_bits_under_every_schedule(device: EmulatedDevice, cache_dtype: torch.dtype) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, cache_dtype), [*RAGGED, (9, 1200)])
    first = run(replace(device, num_sms=8), batch)
    for schedule in (Schedule("newest"), Schedule("random", seed=1), Schedule("random", seed=2, early_copies=True)):
        assert torch.equal(run(replace(device, num_sms=8, schedule=schedule), batch).view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("random", seed=3), Schedule("newest", early_copies=True)], ids=str)
def test_nothing_is_read_or_written_that_must_not(watched: EmulatedDevice, cache_dtype: torch.dtype, schedule: Schedule) -> None:
    sinks = torch.zeros(6)
    for window, soft_cap in ((None, None), (30, 20.0)):
        spec = spec_of((6, 2), 64, BF16, cache_dtype, window=window, soft_cap=soft_cap)
        batch = Paged(spec, [(1, 1), (17, 64), (2, 0), (70, 200), (5, 700)], 32)
        assert batch.judge(run(replace(watched, num_sms=8, schedule=schedule), batch, sinks=sinks), sinks) <= 1


def test_prefill_and_decode_divide_a_mixed_batch(device: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20), (30, 90), (1, 400), (40, 40), (2, 9)])
    out = run(device, batch, chosen=[1, 3])
    assert batch.judge(out, chosen=[1, 3]) <= 1
    decode = DecodeAttention(device, batch.spec, 5)
    decode.load(decode.plan(batch.query_start, batch.seq_lens, chosen=np.array([True, False, True, False, True])))
    decode.launch(batch.query, batch.cache, batch.block_tables, out)
    assert batch.judge(out) <= 1


def _sharing(spec: Any, lengths: list[tuple[int, int]], shared: dict[int, int], block_size: int = 16) -> Paged:
    """A batch where sequences begin as sequence 0 does, for so many blocks."""
    batch = Paged(spec, lengths, block_size)
    for sequence, blocks in shared.items():
        batch.block_tables[sequence, :blocks] = batch.block_tables[0, :blocks]
        for own, first in zip(batch.contexts[sequence], batch.contexts[0], strict=True):
            own[: blocks * block_size] = first[: blocks * block_size]
    return batch


@pytest.mark.parametrize(("cache_dtype", "num_sms"), [(BF16, 1), (BF16, 40), (INT8, 8)], ids=str)
def test_a_shared_prefix_is_attended_to_once(device: EmulatedDevice, cache_dtype: torch.dtype, num_sms: int) -> None:
    """Cascade is the plain computation: decodes, drafts and a chunk that share 70 blocks, and others that do not."""
    lengths = [(1, 1200), (1, 1130), (3, 1140), (40, 1170), (1, 1200), (1, 300), (20, 50), (1, 0)]
    spec = spec_of((8, 2), 64, BF16, cache_dtype)
    batch = _sharing(spec, lengths, dict.fromkeys((1, 2, 3, 4), 70))
    device = replace(device, num_sms=num_sms)
    new = np.diff(batch.query_start)
    groups = shared_prefixes(batch.block_tables.numpy(), (batch.seq_lens - new).clip(0) // 16)
    assert groups == [([0, 1, 2, 3, 4], 70)]
    shared = SharedPrefix(device, spec, max_rows=64)
    shared.load(shared.plan(groups, batch.query_start, batch.block_tables.numpy(), 16))
    prefix = shared.launch(batch.query, batch.cache)
    begins = np.array([1120] * 5 + [0] * 3, dtype=np.int32)
    few = new * 4 <= 16
    sinks = torch.linspace(-2, 2, 8)
    out = run(device, batch, chosen=[3, 6], prefix_lens=begins, prefix=prefix, sinks=sinks)
    decode = DecodeAttention(device, spec, 8)
    decode.load(decode.plan(batch.query_start, batch.seq_lens, begins=begins, chosen=few & (new > 0)))
    decode.launch(batch.query, batch.cache, batch.block_tables, out, prefix=prefix, sinks=sinks)
    assert batch.judge(out, sinks) <= 1


def test_two_groups_have_their_own_rows(device: EmulatedDevice) -> None:
    batch = _sharing(spec_of(), [(2, 100), (1, 90), (3, 99), (1, 80), (5, 5)], {2: 5})
    batch.block_tables[3, :4] = batch.block_tables[1, :4]
    shared = SharedPrefix(device, batch.spec, max_rows=64)
    shared.load(shared.plan([([0, 2], 5), ([1, 3], 4)], batch.query_start, batch.block_tables.numpy(), 16))
    states = shared.launch(batch.query, batch.cache)
    for sequence, length, keys in ((0, 80, 0), (2, 80, 0), (1, 64, 1), (3, 64, 1)):
        rows, (key, value) = batch.rows(sequence), batch.contexts[keys]
        query = batch.query[rows].double()
        scores = torch.einsum("nhd,chd->nhc", query, key[:length].repeat_interleave(2, 1).double()) / 8
        exact = torch.einsum("nhc,chd->nhd", scores.softmax(-1), value[:length].repeat_interleave(2, 1).double())
        assert torch.allclose(states.out[rows].double(), exact, atol=2e-2)
        assert torch.allclose(states.logarithms[rows].double(), scores.logsumexp(-1) / np.log(2), atol=1e-3)


def test_logarithms(device: EmulatedDevice) -> None:
    batch = Paged(spec_of((8, 2)), [(1, 1), (20, 30), (3, 900)])
    for num_sms in (1, 40):  # whole, and in pieces
        logarithms = torch.full((25, 8), NAN)
        run(replace(device, num_sms=num_sms), batch, logarithms=logarithms)
        for sequence, (new, length) in enumerate(batch.lengths):
            keys, _ = batch.contexts[sequence]
            query = batch.query[batch.rows(sequence)].double()
            scores = torch.einsum("nhd,chd->nhc", query, keys.double().repeat_interleave(4, 1)) / 8
            hidden = torch.arange(length) > (torch.arange(new) + length - new)[:, None, None]
            exact = scores.masked_fill(hidden, -torch.inf).logsumexp(-1) / np.log(2)
            assert torch.allclose(logarithms[batch.rows(sequence)].double(), exact, atol=1e-4)
        assert bool(logarithms[24:].isnan().all())


def test_offsets_beyond_32_bits(device: EmulatedDevice) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, INT8), [(20, 30)])
    apart, half = 2**31 + 4096, 2**31 // 2
    memory = torch.empty(2 * apart, dtype=INT8)  # never touched but for two blocks
    shape, strides = (2, 2, 16, 64), (apart, 1024, 64, 1)
    keys, values = memory.as_strided(shape, strides, 0), memory.as_strided(shape, strides, half)
    old = batch.block_tables[0, :2].long()
    keys.copy_(batch.cache.keys[old])
    values.copy_(batch.cache.values[old])
    scales = [part[old].contiguous() for part in (batch.cache.key_scales, batch.cache.value_scales) if part is not None]
    batch.cache = LayerCache(keys, values, *scales)
    batch.block_tables[0, :2] = torch.tensor([0, 1])
    assert batch.judge(run(device, batch)) <= 1


def _bad(batch: Paged) -> dict[str, dict[str, Any]]:
    tables, start, lengths = tables_of(batch)
    cache = batch.cache
    return {
        "query has the shape": {"query": batch.query[:, :3], "out": batch.out()[:, :3].contiguous()},
        "query is float16": {"query": batch.query.half()},
        "rows of query": {"query": torch.zeros(batch.query.numel() + 2, dtype=BF16)[2:].view(batch.query.shape)},
        "out has the shape": {"out": batch.out()[1:]},
        "out must be contiguous": {"out": batch.out().transpose(0, 1).contiguous().transpose(0, 1)},
        "block_tables is int64": {"tables": tables.long()},
        "query_start has the shape": {"start": start[1:]},
        "seq_lens is int64": {"lengths": lengths.long()},
        "keys is float16": {"cache": LayerCache(cache.keys.half(), cache.values.half())},
        "the block size of keys is 8": {"cache": LayerCache(cache.keys[:, :, :8], cache.values[:, :, :8])},
        "sinks has the shape": {"sinks": torch.zeros(3)},
        "logarithms has the shape": {"logarithms": torch.zeros(3, 5)},
        "prefix.out is bfloat16": {"prefix": States(batch.out(), torch.zeros(batch.out().shape[:2]))},
    }


def test_what_does_not_fit_is_refused_by_name(device: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(20, 20), (1, 5)])
    tables, start, lengths = tables_of(batch)
    prefill = PrefillAttention(device, batch.spec, max_rows=64)
    good = {"query": batch.query, "cache": batch.cache, "tables": tables, "start": start, "lengths": lengths, "out": batch.out()}
    for sentence, change in _bad(batch).items():
        arguments = {**good, **change}
        with pytest.raises(ValueError, match=f"^{sentence}"):
            prefill.launch(*[arguments.pop(name) for name in good], **arguments)
    with pytest.raises(ValueError, match="window is 5"):
        SharedPrefix(device, spec_of(window=5))


def test_a_step_without_chunks_launches_nothing(device: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20)])
    out = run(device, batch, chosen=[])
    assert bool(out.isnan().all())

"""Decode attention on the emulator against float64: no worse than plain torch in the same dtype, whatever lies around it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamkv_kernels.attention import AttentionSpec, MergeStates, States
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.emulated import EmulatedDevice, Schedule
from streamkv_kernels.kv_write import LayerCache
from tests.kernels.paged import NAN, Paged, spec_of, torch_states

BF16, F16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8

# (new tokens, tokens): around a tile and a block, drafts, a split in many pieces, padding.
RAGGED = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 32), (3, 33), (16, 16), (16, 170), (1, 1300), (1, 0), (2, 65), (1, 130)]

DTYPES = [
    (dtype, cache_dtype, head_dim)
    for dtype in (BF16, F16)
    for cache_dtype in (dtype, E4M3, INT8)
    for head_dim in (64, 80, 96, 128, 256)
]


@pytest.fixture(scope="module")
def device(libraries: Path) -> EmulatedDevice:
    return EmulatedDevice(cache=libraries, optimize=1)


@pytest.fixture(scope="module")
def watched(libraries: Path) -> EmulatedDevice:
    return EmulatedDevice(cache=libraries, optimize=1, checked=True)


def run(device: EmulatedDevice, batch: Paged, chosen: list[int] | None = None, **more: Any) -> torch.Tensor:
    decode = DecodeAttention(device, batch.spec, len(batch.lengths))
    mask = None if chosen is None else np.isin(np.arange(len(batch.lengths)), chosen)
    decode.load(decode.plan(batch.query_start, batch.seq_lens, begins=more.pop("begins", None), chosen=mask))
    out = batch.out()
    decode.launch(batch.query, batch.cache, batch.block_tables, out, **more)
    return out


@pytest.mark.parametrize(("dtype", "cache_dtype", "head_dim"), DTYPES, ids=str)
def test_dtypes_and_head_dims(device: EmulatedDevice, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    batch = Paged(spec_of((4, 2), head_dim, dtype, cache_dtype), RAGGED)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize(("dtype", "cache_dtype", "head_dim"), DTYPES, ids=str)
def test_no_lane_waits_for_a_bank(device: EmulatedDevice, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    batch = Paged(spec_of((4, 2), head_dim, dtype, cache_dtype), [(1, 150)])
    decode = DecodeAttention(device, batch.spec, 1)
    decode.load(decode.plan(batch.query_start, batch.seq_lens))
    decode.bind(batch.query, batch.cache, batch.block_tables, batch.out()).attend.launch()
    assert device.counters["ldmatrix"] > 0
    assert device.counters["ldmatrix_wavefronts"] == 4 * device.counters["ldmatrix"]


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (14, 2), (16, 1), (20, 1), (40, 2)], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_groups_and_block_sizes(device: EmulatedDevice, heads: tuple[int, int], block_size: int) -> None:
    batch = Paged(spec_of(heads), [(1, 1), (1, 40), (4, 64), (1, 63), (2, 300)], block_size)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("window", [1, 5, 16, 17, 100, 4096])
@pytest.mark.parametrize("soft_cap", [None, 2.0, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_caps_and_sinks(device: EmulatedDevice, window: int, soft_cap: float | None, with_sinks: bool) -> None:
    batch = Paged(spec_of(window=window, soft_cap=soft_cap), RAGGED)
    sinks = torch.tensor([0.5, -3.0, 4.0, 30.0]) if with_sinks else None
    assert batch.judge(run(device, batch, sinks=sinks), sinks) <= 1


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_flat_and_sharp_scores(device: EmulatedDevice, scale: float) -> None:
    batch = Paged(spec_of(scale=scale), RAGGED)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("new", range(1, 17))
def test_new_tokens_see_those_before_them(device: EmulatedDevice, new: int) -> None:
    batch = Paged(spec_of((8, 2)), [(new, new), (new, 31 + new), (new, 700)])
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("size", [1e-3, 1000.0])
def test_small_and_large_values_of_8_bits(device: EmulatedDevice, size: float) -> None:
    batch = Paged(spec_of((4, 2), 64, F16, INT8, scale=0.1 / size), RAGGED, size=size)
    assert batch.judge(run(device, batch)) <= 1


@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_any_number_of_shares(device: EmulatedDevice, num_sms: int) -> None:
    batch = Paged(spec_of((8, 4)), [(1, 2000), (1, 20), (1, 250), (2, 513)])
    assert batch.judge(run(replace(device, num_sms=num_sms), batch)) <= 1


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
def test_the_same_bits_under_every_schedule(device: EmulatedDevice, cache_dtype: torch.dtype) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, cache_dtype), RAGGED)
    first = run(device, batch)
    for schedule in (Schedule("newest"), Schedule("random", seed=1), Schedule("random", seed=2, early_copies=True)):
        assert torch.equal(run(replace(device, schedule=schedule), batch).view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize(("cache_dtype", "head_dim"), [(BF16, 64), (INT8, 64)], ids=str)
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("random", seed=3), Schedule("newest", early_copies=True)], ids=str)
def test_nothing_is_read_or_written_that_must_not(
    watched: EmulatedDevice, cache_dtype: torch.dtype, head_dim: int, schedule: Schedule
) -> None:
    sinks = torch.zeros(6)
    for window, soft_cap in ((None, None), (70, 20.0)):
        batch = Paged(spec_of((6, 2), head_dim, BF16, cache_dtype, window=window, soft_cap=soft_cap), RAGGED, 32)
        assert batch.judge(run(replace(watched, schedule=schedule), batch, sinks=sinks), sinks) <= 1


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
def test_memory_is_read_in_whole_sectors_and_shared_memory_without_turns(
    watched: EmulatedDevice, cache_dtype: torch.dtype
) -> None:
    batch = Paged(spec_of((6, 2), 64, BF16, cache_dtype), [(1, 1300)], 32)
    device = replace(watched, record_traffic=True)
    decode = DecodeAttention(device, batch.spec, 1)
    decode.load(decode.plan(batch.query_start, batch.seq_lens))
    bound = decode.bind(batch.query, batch.cache, batch.block_tables, batch.out())
    bound.attend.launch()
    counters = device.counters
    assert counters["least_shared_wavefronts"] > 0
    assert counters["shared_wavefronts"] <= 1.06 * counters["least_shared_wavefronts"]  # outputs of 8 bits meet at the end
    assert counters["global_sectors"] <= 1.05 * counters["least_global_sectors"]  # queries are read by halves of sectors
    tiles = 2 * -(-1300 // 16)
    cache = tiles * 16 * 64 * cache_dtype.itemsize * 2 // 32
    assert counters["global_sectors"] < 1.5 * cache  # for all rows once; the rest is queries, outputs and states
    bound.merge.launch()
    assert device.counters["global_sectors"] == device.counters["least_global_sectors"]


def test_sequences_that_are_not_chosen_stay_as_they_are(device: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20), (30, 90), (1, 400), (40, 40), (2, 9)])
    assert batch.judge(run(device, batch, chosen=[0, 2, 4]), chosen=[0, 2, 4]) <= 1


@pytest.mark.parametrize("num_sms", [1, 16])
def test_states_of_a_shared_prefix_join(device: EmulatedDevice, num_sms: int) -> None:
    batch = Paged(spec_of((8, 2)), [(1, 100), (1, 64 + 700), (2, 50), (3, 67), (1, 900)])
    begins = np.array([64, 64, 0, 64, 128], dtype=np.int32)
    prefix = torch_states(batch, begins)
    for sequence, begin in enumerate(begins.tolist()):  # whoever reads these now is found out
        blocks = batch.block_tables[sequence, : begin // 16].long()
        batch.cache.keys[blocks] = NAN
        batch.block_tables[sequence, : begin // 16] = -1
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    out = run(replace(device, num_sms=num_sms), batch, begins=begins, prefix=prefix, sinks=sinks)
    assert batch.judge(out, sinks) <= 1


def test_logarithms(device: EmulatedDevice) -> None:
    batch = Paged(spec_of((8, 2)), [(1, 1), (2, 30), (1, 900), (1, 0)])
    logarithms = torch.full((6, 8), NAN)
    sinks = torch.linspace(-3, 3, 8)
    run(device, batch, logarithms=logarithms, sinks=sinks)
    for sequence in range(4):
        keys, _ = batch.contexts[sequence]
        new, length = batch.lengths[sequence]
        scores = (
            torch.einsum("nhd,chd->nhc", batch.query[batch.rows(sequence)].double(), keys.double().repeat_interleave(4, 1)) / 8
        )
        scores = scores.masked_fill(torch.arange(length) > (torch.arange(new) + length - new)[:, None, None], -math.inf)
        exact = torch.cat([scores, sinks.double()[None, :, None].expand(new, -1, 1)], dim=-1).logsumexp(-1) / math.log(2)
        assert torch.allclose(logarithms[batch.rows(sequence)].double(), exact, atol=1e-4)
    assert bool(logarithms[5:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_states_merge_into_the_rows_that_an_index_names(device: EmulatedDevice, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    states = States(torch.randn((7, 32, 80), generator=random), 20 * torch.randn((7, 32), generator=random))
    states.logarithms[2] = -math.inf
    merges = torch.tensor([[1, 4, 19, 1, 0, 3, 0, 0], [0] * 8, [0, 0, 5, 0, 3, 4, 0, 0]], dtype=torch.int32)
    row_index = torch.tensor([9, 2, 7, 4, 5, 1, 0, 3], dtype=torch.int32)
    out, logarithms = torch.full((10, 8, 80), NAN).to(dtype), torch.full((10, 8), NAN)
    bound = MergeStates(device, 80, dtype).bind(states, merges, out, 2, row_index=row_index, logarithms=logarithms)
    bound.launch()
    left = torch.ones(10, 8, dtype=torch.bool)
    for first_row, first_packed, rows, head, state, pieces, _, _ in merges.tolist():
        for row in range(rows):
            packed = first_packed + row
            token, place = int(row_index[first_row + packed // 4]), head * 4 + packed % 4
            own = slice(state, state + pieces)
            weights = torch.softmax(states.logarithms[own, row].double() * math.log(2), 0)
            exact = (weights[:, None] * states.out[own, row].double()).sum(0)
            assert torch.allclose(out[token, place].double(), exact, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 2**-8)
            total = (states.logarithms[own, row].double() * math.log(2)).logsumexp(0) / math.log(2)
            assert torch.allclose(logarithms[token, place].double(), total, atol=1e-4)
            left[token, place] = False
    assert bool(out[left].isnan().all())


def test_offsets_beyond_32_bits(device: EmulatedDevice) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, INT8), [(1, 30)])
    apart, half = 2**31 + 4096, 2**31 // 2
    memory = torch.empty(2 * apart, dtype=INT8)  # never touched but for two blocks
    shape, strides = (2, 2, 16, 64), (apart, 1024, 64, 1)
    keys, values = memory.as_strided(shape, strides, 0), memory.as_strided(shape, strides, half)
    old = batch.block_tables[0, :2].long()
    for new, now in ((keys, batch.cache.keys), (values, batch.cache.values)):
        new.copy_(now[old])
    scales = [part[old].contiguous() for part in (batch.cache.key_scales, batch.cache.value_scales) if part is not None]
    batch.cache = LayerCache(keys, values, *scales)
    batch.block_tables[0, :2] = torch.tensor([0, 1])
    assert batch.judge(run(device, batch)) <= 1


def _bad(batch: Paged) -> dict[str, dict[str, Any]]:
    tables, cache = batch.block_tables, batch.cache
    return {
        "query has the shape": {"query": batch.query[:, :3], "out": batch.out()[:, :3].contiguous()},
        "query is float16": {"query": batch.query.half()},
        "the last dimension of query": {"query": batch.query.transpose(0, 2).contiguous().transpose(0, 2)},
        "rows of query": {"query": torch.zeros(batch.query.numel() + 1, dtype=BF16)[1:].view(batch.query.shape)},
        "out has the shape": {"out": batch.out()[1:]},
        "out must be contiguous": {"out": batch.out().transpose(0, 1).contiguous().transpose(0, 1)},
        "block_tables is int64": {"block_tables": tables.long()},
        "block_tables has the shape": {"block_tables": tables[0]},
        "keys has the shape": {"cache": LayerCache(cache.keys[:, :1], cache.values[:, :1])},
        "keys is float16": {"cache": LayerCache(cache.keys.half(), cache.values.half())},
        "the block size of keys is 8": {"cache": LayerCache(cache.keys[:, :, :8], cache.values[:, :, :8])},
        "rows of keys and values": {"cache": LayerCache(_shifted(cache.keys), _shifted(cache.values))},
        "sinks has the shape": {"sinks": torch.zeros(3)},
        "sinks is bfloat16": {"sinks": torch.zeros(4, dtype=BF16)},
        "logarithms has the shape": {"logarithms": torch.zeros(3, 5)},
        "prefix.out is bfloat16": {"prefix": States(batch.out(), torch.zeros(batch.out().shape[:2]))},
        "prefix.logarithms has the shape": {"prefix": States(batch.out().float(), torch.zeros(2, 4))},
    }


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.numel() + 2, dtype=x.dtype)[2:].view(x.shape)


def test_what_does_not_fit_is_refused_by_name(device: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20), (1, 5)])
    decode = DecodeAttention(device, batch.spec, 2)
    for sentence, change in _bad(batch).items():
        arguments = {"query": batch.query, "cache": batch.cache, "block_tables": batch.block_tables, "out": batch.out(), **change}
        with pytest.raises(ValueError, match=f"^{sentence}"):
            decode.bind(**arguments)
    with pytest.raises(ValueError, match="the plan has 3 sequences"):
        decode.load(decode.plan(np.arange(4), np.full(3, 9)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": (5, 2)}, "num_heads is 5"),
        ({"head_dim": 72}, "head_dim is 72"),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"cache_dtype": F16}, "cache_dtype is torch.float16"),
        ({"window": 0}, "window is 0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
    ],
)
def test_layers_without_kernels_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        spec_of(**change)


def test_a_graph_would_replay_with_the_next_plan(device: EmulatedDevice) -> None:
    """One binding serves every step: what changes lies in tensors that stay."""
    spec: AttentionSpec = spec_of()
    first, second = (Paged(spec, lengths, spare_rows=0) for lengths in ([(1, 20), (1, 300)], [(1, 33), (1, 5)]))
    decode = DecodeAttention(device, spec, 2)
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    query, out, tables = first.query.clone(), first.out(), torch.full((2, width), -1, dtype=torch.int32)
    blocks = max(len(first.cache.keys), len(second.cache.keys))
    cache = LayerCache(*(torch.full((blocks, 2, 16, 64), NAN, dtype=BF16) for _ in range(2)))
    bound = decode.bind(query, cache, tables, out)
    for batch in (first, second):
        query.copy_(batch.query)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        cache.keys[: len(batch.cache.keys)] = batch.cache.keys
        cache.values[: len(batch.cache.values)] = batch.cache.values
        decode.load(decode.plan(batch.query_start, batch.seq_lens))
        bound.launch()
        assert batch.judge(out) <= 1

"""What decode and prefill must do alike, on the emulator against float64: no worse than plain torch in the same dtype."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from streamkv_kernels.attention import States
from streamkv_kernels.emulated import EmulatedDevice, Schedule
from streamkv_kernels.kv_write import LayerCache
from tests.kernels.paged import NAN, Paged, spec_of
from tests.kernels.ways import WAYS, Way

BF16, F16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8

# Decode with everything, prefill, whose loops are over the same functions, with every value of each.
VARIANTS = [
    *(
        ("decode", dtype, cache_dtype, head_dim)
        for dtype in (BF16, F16)
        for cache_dtype in (dtype, E4M3, INT8)
        for head_dim in (64, 80, 96, 128, 256)
    ),
    *(("prefill", BF16, BF16, head_dim) for head_dim in (64, 80, 96, 128, 256)),
    *(("prefill", F16, F16, head_dim) for head_dim in (64, 128)),
    *(("prefill", BF16, E4M3, head_dim) for head_dim in (80, 128)),
    *(("prefill", BF16, INT8, head_dim) for head_dim in (64, 256)),
    ("prefill", F16, E4M3, 64),
    ("prefill", F16, INT8, 96),
]
# Each group with a block size of its own, one with all.
GROUPS = [
    *(((14, 2), size) for size in (16, 32, 48, 64)),
    *zip([(1, 1), (4, 4), (6, 3), (16, 1), (8, 1), (20, 1), (40, 2)], (16, 32, 48, 64) * 2, strict=False),
]
SINKS = torch.tensor([0.5, -3.0, 4.0, 30.0])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.mark.parametrize(("name", "dtype", "cache_dtype", "head_dim"), VARIANTS, ids=str)
def test_dtypes_and_head_dims(
    plain: EmulatedDevice, name: str, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int
) -> None:
    batch = Paged(spec_of((4, 2), head_dim, dtype, cache_dtype), WAYS[name].ragged)
    assert batch.judge(WAYS[name].run(plain, batch)) <= 1


@pytest.mark.parametrize(("heads", "block_size"), GROUPS, ids=str)
def test_groups_and_block_sizes(plain: EmulatedDevice, way: Way, heads: tuple[int, int], block_size: int) -> None:
    batch = Paged(spec_of(heads), way.few, block_size)
    assert batch.judge(way.run(plain, batch)) <= 1


@pytest.mark.parametrize("window", [1, 5, 16, 17, 70, 4096])
@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(None, False), (None, True), (2.0, True), (30.0, False)])
def test_windows_caps_and_sinks(plain: EmulatedDevice, way: Way, window: int, soft_cap: float | None, with_sinks: bool) -> None:
    batch = Paged(spec_of(window=window, soft_cap=soft_cap), way.ragged)
    sinks = SINKS if with_sinks else None
    assert batch.judge(way.run(plain, batch, sinks=sinks), sinks) <= 1


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_flat_and_sharp_scores(plain: EmulatedDevice, way: Way, scale: float) -> None:
    batch = Paged(spec_of(scale=scale), way.ragged)
    assert batch.judge(way.run(plain, batch)) <= 1


@pytest.mark.parametrize("size", [1e-3, 1000.0])
def test_small_and_large_values_of_8_bits(plain: EmulatedDevice, way: Way, size: float) -> None:
    batch = Paged(spec_of((4, 2), 96, F16, INT8, scale=0.1 / size), way.ragged, size=size)
    assert batch.judge(way.run(plain, batch)) <= 1


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
def test_the_same_bits_under_every_schedule(plain: EmulatedDevice, way: Way, cache_dtype: torch.dtype) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, cache_dtype), [*way.ragged, (9, 1200)])
    device = replace(plain, num_sms=8)
    first = way.run(device, batch)
    for schedule in (Schedule("newest"), Schedule("random", seed=1), Schedule("random", seed=2, early_copies=True)):
        assert torch.equal(way.run(replace(device, schedule=schedule), batch).view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("random", seed=3), Schedule("newest", early_copies=True)], ids=str)
def test_nothing_is_read_or_written_that_must_not(
    checked: EmulatedDevice, way: Way, cache_dtype: torch.dtype, schedule: Schedule
) -> None:
    device, sinks = replace(checked, num_sms=8, schedule=schedule), torch.zeros(6)
    for window, soft_cap in ((None, None), (30, 20.0)):
        spec = spec_of((6, 2), 64, BF16, cache_dtype, window=window, soft_cap=soft_cap)
        batch = Paged(spec, [*way.few, (2, 0), (5, 700)], 32)
        assert batch.judge(way.run(device, batch, sinks=sinks), sinks) <= 1


def test_sequences_that_are_not_chosen_stay_as_they_are(plain: EmulatedDevice, way: Way) -> None:
    batch = Paged(spec_of(), [(1, 20), (30, 90), (1, 400), (40, 40), (2, 9)])
    assert batch.judge(way.run(plain, batch, chosen=[0, 2, 4]), chosen=[0, 2, 4]) <= 1


@pytest.mark.parametrize("num_sms", [1, 40], ids=["whole", "in pieces"])
def test_logarithms(plain: EmulatedDevice, way: Way, num_sms: int) -> None:
    batch = Paged(spec_of((8, 2)), [(1, 1), (20, 30), (3, 900), (1, 0)])
    logarithms, sinks = torch.full((26, 8), NAN), torch.linspace(-3, 3, 8)
    way.run(replace(plain, num_sms=num_sms), batch, logarithms=logarithms, sinks=sinks)
    for sequence, (new, length) in enumerate(batch.lengths):
        keys, query = batch.contexts[sequence][0], batch.query[batch.rows(sequence)]
        scores = torch.einsum("nhd,chd->nhc", query.double(), keys.double().repeat_interleave(4, 1)) / 8
        scores = scores.masked_fill(torch.arange(length) > (torch.arange(new) + length - new)[:, None, None], -math.inf)
        exact = torch.cat([scores, sinks.double()[None, :, None].expand(new, -1, 1)], dim=-1).logsumexp(-1) / math.log(2)
        assert torch.allclose(logarithms[batch.rows(sequence)].double(), exact, atol=1e-4)
    assert bool(logarithms[25:].isnan().all())


def test_offsets_beyond_32_bits(plain: EmulatedDevice, way: Way) -> None:
    batch = Paged(spec_of((4, 2), 64, BF16, INT8), [(2, 30)])
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
    assert batch.judge(way.run(plain, batch)) <= 1


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


def test_what_does_not_fit_is_refused_by_name(plain: EmulatedDevice, way: Way) -> None:
    batch = Paged(spec_of(), [(1, 20), (1, 5)])
    for sentence, change in _bad(batch).items():
        with pytest.raises(ValueError, match=f"^{sentence}"):
            way.run(plain, batch, **change)


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

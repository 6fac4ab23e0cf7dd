"""What is decode's own, and the merge of states; test_attention.py has what decode and prefill must do alike."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from streamkv_kernels.attention import AttentionSpec, MergeStates, States
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.kv_write import LayerCache
from tests.kernels.paged import NAN, Paged, spec_of, torch_states
from tests.kernels.ways import decode

BF16, INT8 = torch.bfloat16, torch.int8


@pytest.mark.parametrize("new", range(1, 17))
def test_new_tokens_see_those_before_them(plain: EmulatedDevice, new: int) -> None:
    batch = Paged(spec_of((8, 2)), [(new, new), (new, 31 + new), (new, 700)])
    assert batch.judge(decode(plain, batch)) <= 1


@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_any_number_of_shares(plain: EmulatedDevice, num_sms: int) -> None:
    batch = Paged(spec_of((8, 4)), [(1, 2000), (1, 20), (1, 250), (2, 513)])
    assert batch.judge(decode(replace(plain, num_sms=num_sms), batch)) <= 1


@pytest.mark.parametrize("cache_dtype", [BF16, INT8], ids=str)
def test_memory_is_read_in_whole_sectors_and_shared_memory_without_turns(
    checked: EmulatedDevice, cache_dtype: torch.dtype
) -> None:
    batch = Paged(spec_of((6, 2), 64, BF16, cache_dtype), [(1, 1300)], 32)
    device = replace(checked, record_traffic=True)
    kernels = DecodeAttention(device, batch.spec, 1)
    kernels.load(kernels.plan(batch.query_start, batch.seq_lens))
    bound = kernels.bind(batch.query, batch.cache, batch.block_tables, batch.out())
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


@pytest.mark.parametrize("num_sms", [1, 16])
def test_states_of_a_shared_prefix_join(plain: EmulatedDevice, num_sms: int) -> None:
    batch = Paged(spec_of((8, 2)), [(1, 100), (1, 64 + 700), (2, 50), (3, 67), (1, 900)])
    begins = np.array([64, 64, 0, 64, 128], dtype=np.int32)
    prefix = torch_states(batch, begins)
    for sequence, begin in enumerate(begins.tolist()):  # whoever reads these now is found out
        blocks = batch.block_tables[sequence, : begin // 16].long()
        batch.cache.keys[blocks] = NAN
        batch.block_tables[sequence, : begin // 16] = -1
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    out = decode(replace(plain, num_sms=num_sms), batch, begins=begins, prefix=prefix, sinks=sinks)
    assert batch.judge(out, sinks) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_states_merge_into_the_rows_that_an_index_names(plain: EmulatedDevice, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    states = States(torch.randn((7, 32, 80), generator=random), 20 * torch.randn((7, 32), generator=random))
    states.logarithms[2] = -math.inf
    merges = torch.tensor([[1, 4, 19, 1, 0, 3, 0, 0], [0] * 8, [0, 0, 5, 0, 3, 4, 0, 0]], dtype=torch.int32)
    row_index = torch.tensor([9, 2, 7, 4, 5, 1, 0, 3], dtype=torch.int32)
    out, logarithms = torch.full((10, 8, 80), NAN).to(dtype), torch.full((10, 8), NAN)
    bound = MergeStates(plain, 80, dtype).bind(states, merges, out, 2, row_index=row_index, logarithms=logarithms)
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


def test_a_graph_would_replay_with_the_next_plan(plain: EmulatedDevice) -> None:
    """One binding serves every step: what changes lies in tensors that stay."""
    spec: AttentionSpec = spec_of()
    first, second = (Paged(spec, lengths, spare_rows=0) for lengths in ([(1, 20), (1, 300)], [(1, 33), (1, 5)]))
    kernels = DecodeAttention(plain, spec, 2)
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    query, out, tables = first.query.clone(), first.out(), torch.full((2, width), -1, dtype=torch.int32)
    blocks = max(len(first.cache.keys), len(second.cache.keys))
    cache = LayerCache(*(torch.full((blocks, 2, 16, 64), NAN, dtype=BF16) for _ in range(2)))
    bound = kernels.bind(query, cache, tables, out)
    for batch in (first, second):
        query.copy_(batch.query)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        cache.keys[: len(batch.cache.keys)] = batch.cache.keys
        cache.values[: len(batch.cache.values)] = batch.cache.values
        kernels.load(kernels.plan(batch.query_start, batch.seq_lens))
        bound.launch()
        assert batch.judge(out) <= 1


def test_a_plan_for_more_sequences_than_there_is_room_for_is_refused(plain: EmulatedDevice) -> None:
    kernels = DecodeAttention(plain, spec_of(), 2)
    with pytest.raises(ValueError, match="the plan has 3 sequences"):
        kernels.load(kernels.plan(np.arange(4), np.full(3, 9)))

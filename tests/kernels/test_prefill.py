"""What is prefill's own, and the pass over shared prefixes; test_attention.py has what decode and prefill must do alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.prefill_plan import shared_prefixes
from tests.kernels.paged import Paged, spec_of
from tests.kernels.ways import WAYS, decode, prefill

BF16, INT8 = torch.bfloat16, torch.int8


@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_row_tiles_a_warp(plain: EmulatedDevice, head_dim: int) -> None:
    batch = Paged(spec_of((4, 2), head_dim), [*WAYS["prefill"].ragged, (200, 300)])
    narrow, wide = (prefill(replace(plain, num_sms=1), batch, max_rows=rows) for rows in (64, 128))
    assert batch.judge(wide) <= 1
    assert batch.judge(narrow) <= 1


@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("window", [None, 900])
def test_a_long_context_in_pieces(plain: EmulatedDevice, new: int, window: int | None) -> None:
    batch = Paged(spec_of((4, 2), window=window), [(new, 2500), (3, 10)])
    sinks = torch.tensor([0.5, -3.0, 4.0, 30.0])
    many = replace(plain, num_sms=20)
    plan = PrefillAttention(many, batch.spec, max_rows=64).plan(np.diff(batch.query_start), batch.seq_lens)
    assert len(plan.merges) == 2  # a job for either KV head
    assert batch.judge(prefill(many, batch, sinks=sinks), sinks) <= 1


def test_prefill_and_decode_divide_a_mixed_batch(plain: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20), (30, 90), (1, 400), (40, 40), (2, 9)])
    out = prefill(plain, batch, chosen=[1, 3])
    assert batch.judge(decode(plain, batch, chosen=[0, 2, 4], out=out)) <= 1


def _sharing(spec: Any, lengths: list[tuple[int, int]], shared: dict[int, int], block_size: int = 16) -> Paged:
    """A batch where sequences begin as sequence 0 does, for so many blocks."""
    batch = Paged(spec, lengths, block_size)
    for sequence, blocks in shared.items():
        batch.block_tables[sequence, :blocks] = batch.block_tables[0, :blocks]
        for own, first in zip(batch.contexts[sequence], batch.contexts[0], strict=True):
            own[: blocks * block_size] = first[: blocks * block_size]
    return batch


@pytest.mark.parametrize(("cache_dtype", "num_sms"), [(BF16, 1), (BF16, 40), (INT8, 8)], ids=str)
def test_a_shared_prefix_is_attended_to_once(plain: EmulatedDevice, cache_dtype: torch.dtype, num_sms: int) -> None:
    """Cascade is the plain computation: decodes, drafts and a chunk that share 70 blocks, and others that do not."""
    lengths = [(1, 1200), (1, 1130), (3, 1140), (40, 1170), (1, 1200), (1, 300), (20, 50), (1, 0)]
    spec = spec_of((8, 2), 64, BF16, cache_dtype)
    batch = _sharing(spec, lengths, dict.fromkeys((1, 2, 3, 4), 70))
    device = replace(plain, num_sms=num_sms)
    new = np.diff(batch.query_start)
    groups = shared_prefixes(batch.block_tables.numpy(), (batch.seq_lens - new).clip(0) // 16)
    assert groups == [([0, 1, 2, 3, 4], 70)]
    shared = SharedPrefix(device, spec, max_rows=64)
    shared.load(shared.plan(groups, batch.query_start, batch.block_tables.numpy(), 16))
    prefix = shared.launch(batch.query, batch.cache)
    begins = np.array([1120] * 5 + [0] * 3, dtype=np.int32)
    few = np.flatnonzero((new > 0) & (new * 4 <= 16)).tolist()
    sinks = torch.linspace(-2, 2, 8)
    out = prefill(device, batch, chosen=[3, 6], begins=begins, prefix=prefix, sinks=sinks)
    decode(device, batch, chosen=few, begins=begins, prefix=prefix, sinks=sinks, out=out)
    assert batch.judge(out, sinks) <= 1


def test_two_groups_have_their_own_rows(plain: EmulatedDevice) -> None:
    batch = _sharing(spec_of(), [(2, 100), (1, 90), (3, 99), (1, 80), (5, 5)], {2: 5})
    batch.block_tables[3, :4] = batch.block_tables[1, :4]
    shared = SharedPrefix(plain, batch.spec, max_rows=64)
    shared.load(shared.plan([([0, 2], 5), ([1, 3], 4)], batch.query_start, batch.block_tables.numpy(), 16))
    states = shared.launch(batch.query, batch.cache)
    for sequence, length, keys in ((0, 80, 0), (2, 80, 0), (1, 64, 1), (3, 64, 1)):
        rows, (key, value) = batch.rows(sequence), batch.contexts[keys]
        query = batch.query[rows].double()
        scores = torch.einsum("nhd,chd->nhc", query, key[:length].repeat_interleave(2, 1).double()) / 8
        exact = torch.einsum("nhc,chd->nhd", scores.softmax(-1), value[:length].repeat_interleave(2, 1).double())
        assert torch.allclose(states.out[rows].double(), exact, atol=2e-2)
        assert torch.allclose(states.logarithms[rows].double(), scores.logsumexp(-1) / np.log(2), atol=1e-3)


def test_a_step_without_chunks_launches_nothing(plain: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(1, 20)])
    assert bool(prefill(plain, batch, chosen=[]).isnan().all())


def test_what_only_prefill_is_given_is_refused_by_name_too(plain: EmulatedDevice) -> None:
    batch = Paged(spec_of(), [(20, 20), (1, 5)])
    with pytest.raises(ValueError, match="query_start has the shape"):
        prefill(plain, batch, query_start=torch.from_numpy(batch.query_start)[1:])
    with pytest.raises(ValueError, match="seq_lens is int64"):
        prefill(plain, batch, seq_lens=torch.from_numpy(batch.seq_lens).long())
    with pytest.raises(ValueError, match="window is 5"):
        SharedPrefix(plain, spec_of(window=5))

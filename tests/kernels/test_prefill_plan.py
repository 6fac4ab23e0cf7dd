"""The plan of prefill tiles: everything is computed once, nothing is read that is not there, nobody works much longer."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv_kernels.prefill_plan import STEP, Shape, plan_prefill, plan_shared, shared_prefixes

LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), min_size=1, max_size=12)


def _arrays(lengths: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    new = np.array([length for length, _ in lengths])
    return new, new + np.array([context for _, context in lengths])


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([1, 2, 4, 7, 8]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 16, 132]),
    st.sampled_from([64, 128]),
    st.booleans(),
)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_every_row_sees_every_token_it_may_see_once(
    window: int | None, lengths: list[tuple[int, int]], group: int, heads: int, num_sms: int, max_rows: int, with_prefix: bool
) -> None:
    new, total = _arrays(lengths)
    prefix = (total - new) // 2 // 16 * 16 * with_prefix
    plan = plan_prefill(new, total, Shape(group, heads, num_sms, max_rows), window=window, prefix_lens=prefix)
    seen = [np.zeros((count * group, length), dtype=np.int8) for count, length in zip(new, total, strict=True)]
    for sequence, row, begin, end, _, _, has_prefix, _ in plan.pieces:
        assert begin % 16 == 0
        assert 0 <= begin < end <= total[sequence]
        assert has_prefix == (prefix[sequence] > 0)
        seen[sequence][row : row + plan.rows, begin:end] += 1
    for count, length, rows, elsewhere in zip(new, total, seen, prefix, strict=True):
        position = length - count + np.arange(count * group) // group
        token = np.arange(length)
        may = (token <= position[:, None]) & (token >= elsewhere)
        if window is not None:
            may &= token > position[:, None] - window
        assert (rows[may] == 1).all()
        assert rows.max(initial=0) <= 1


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([1, 4]), st.sampled_from([1, 8]), st.sampled_from([4, 132]))
def test_pieces_leave_states_that_follow_each_other(lengths: list[tuple[int, int]], group: int, heads: int, num_sms: int) -> None:
    new, total = _arrays(lengths)
    plan = plan_prefill(new, total, Shape(group, heads, num_sms))
    written: dict[int, tuple[int, ...]] = {}  # state -> first row, packed row, head, tokens
    for sequence, row, begin, end, state, pieces, _, _ in plan.pieces.tolist():
        for head in range(heads if state >= 0 else 0):
            written[state + head * pieces] = (int(new[:sequence].sum()), row, head, begin, end)
    assert sorted(written) == list(range(plan.num_states))
    joined = 0
    for first_row, row, count, head, first, pieces, has_prefix, _ in plan.merges.tolist():
        mine = [written[first + piece] for piece in range(pieces)]
        assert pieces > 1
        assert not has_prefix
        assert {one[:3] for one in mine} == {(first_row, row, head)}
        assert all(before[4] == after[3] for before, after in pairwise(mine))
        assert 0 < count <= plan.rows
        joined += pieces
    assert joined == plan.num_states


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_the_longest_comes_first_and_nobody_has_much_more_than_a_share(lengths: list[tuple[int, int]]) -> None:
    new, total = _arrays(lengths)
    plan = plan_prefill(new, total, Shape(4, 8, 132))
    tokens = plan.pieces[:, 3] - plan.pieces[:, 2]
    assert (np.diff(tokens) <= 0).all()
    cost = -(-tokens // STEP)
    share = max(8, -(-cost.sum() * 8 // 264))
    assert cost.max(initial=0) <= 1.5 * share + 1


def test_a_lone_chunk_on_a_long_context_fills_the_device() -> None:
    plan = plan_prefill(np.array([16]), np.array([32768]), Shape(4, 8, 132))
    assert len(plan.pieces) == 32  # of 264 blocks / 8 heads
    assert plan.num_states == 256
    assert plan.merges[:2].tolist() == [[0, 0, 64, 0, 0, 32, 0, 0], [0, 0, 64, 1, 32, 32, 0, 0]]


def test_many_tiles_are_wide_and_whole() -> None:
    plan = plan_prefill(np.array([8192]), np.array([8192]), Shape(4, 8, 132))
    assert plan.rows == 128
    assert plan.num_states == 0
    assert plan_prefill(np.array([8192]), np.array([8192]), Shape(4, 8, 132, max_rows=64)).rows == 64


def test_sequences_that_are_not_chosen_have_no_pieces() -> None:
    new, total = np.array([5, 1, 3]), np.array([5, 90, 30])
    plan = plan_prefill(new, total, Shape(2, 1, 8), chosen=np.array([True, False, True]))
    assert sorted(plan.pieces[:, 0]) == [0, 2]
    nobody = plan_prefill(new, total, Shape(2, 1, 8), chosen=np.zeros(3, dtype=bool))
    assert nobody.pieces.shape == (0, 8)
    assert nobody.merges.shape == (0, 8)


def test_a_shared_prefix_always_leaves_states() -> None:
    tables = np.arange(3 * 300).reshape(3, 300)
    shared = plan_shared([([1], 4), ([0, 2], 256)], np.array([0, 30, 35, 45]), tables, 16, Shape(4, 2, 8))
    assert shared.row_index.tolist() == [*range(30, 35), *range(30), *range(35, 45)]
    assert shared.row_start.tolist() == [0, 5, 45]
    assert shared.lengths.tolist() == [64, 4096]
    assert shared.block_tables.tolist() == tables[[1, 0], :256].tolist()
    plan = shared.pieces
    assert (plan.pieces[:, 4] >= 0).all()
    assert plan.merges[0].tolist() == [0, 0, 20, 0, 0, 1, 0, 0]
    assert set(plan.merges[2:, 0]) == {5}  # row_index of the second group begins behind that of the first
    covered = plan.pieces[(plan.pieces[:, 0] == 1) & (plan.pieces[:, 1] == 0)]
    assert len(covered) > 1
    assert (covered[:, 3] - covered[:, 2]).sum() == 4096
    assert shared.launches == (64, 16, 8)
    assert (plan.pieces[:, 3] == 0).sum() == 6, "idle ones fill it up"


TABLES = st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=9)


def _in_common(tables: np.ndarray, limit: np.ndarray, members: list[int]) -> int:
    count = 0
    while count < limit[members].min() and len(set(tables[members, count])) == 1:
        count += 1
    return count


@settings(max_examples=100, deadline=None)
@given(TABLES, st.data())
def test_groups_share_what_they_say_and_the_first_saves_most(rows: list[list[int]], data: st.DataObject) -> None:
    tables = np.array(rows)
    limit = np.array(data.draw(st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows))))
    groups = shared_prefixes(tables, limit, min_blocks=2, min_seqs=2)
    members = [sequence for group, _ in groups for sequence in group]
    assert len(members) == len(set(members))
    for group, blocks in groups:
        assert len(group) >= 2
        assert 2 <= blocks <= _in_common(tables, limit, group)
    most = 0
    for size in range(2, len(rows) + 1):
        for some in combinations(range(len(rows)), size):
            blocks = _in_common(tables, limit, list(some))
            most = max(most, blocks * (size - 1) if blocks >= 2 else 0)
    assert most == max([(len(group) - 1) * blocks for group, blocks in groups], default=0)


def test_a_group_inside_a_group_does_not_cut_the_outer_one() -> None:
    tables = np.zeros((12, 40), dtype=np.int32)
    tables[:, 4:] = np.arange(12)[:, None]  # all share 4 blocks
    tables[4:8, 4:30] = 7  # and four of them 30
    found = shared_prefixes(tables, np.full(12, 40))
    assert found == [([4, 5, 6, 7], 30), ([0, 1, 2, 3, 8, 9, 10, 11], 4)]

"""The plan of decode: every tile once, shares alike, no piece too short, states where the merge looks for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv_kernels.decode_plan import MIN_PIECE, DecodePlan, plan_decode

LENGTHS = st.lists(st.tuples(st.integers(0, 16), st.one_of(st.integers(0, 40), st.integers(0, 9000))), max_size=12)
GROUPS = st.sampled_from([1, 4, 7, 16, 71])
SHARES = st.sampled_from([1, 2, 8, 264])


def _arrays(lengths: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """`query_start` and `seq_lens` of (new tokens, tokens before them); no new tokens: not in this step."""
    query_start = np.cumsum([0] + [new for new, _ in lengths]).astype(np.int32)
    return query_start, np.array([new + before for new, before in lengths], dtype=np.int32)


def _pieces(plan: DecodePlan, num_kv_heads: int) -> list[tuple[int, int, int, int, int]]:
    """(sequence, job, first tile, past, state or -1) of all pieces, as the kernel walks through them."""
    found = []
    for share in plan.shares[:, :5].tolist():
        at, job, tile, left, state = share
        while left > 0:
            tiles, row_tiles = plan.sequences[at, 6:].tolist()
            count = min(left, tiles - tile)
            whole = count == tiles
            found.append((at, job, tile, tile + count, -1 if whole else state))
            state += not whole
            left, tile, job = left - count, 0, job + 1
            if job == row_tiles * num_kv_heads:
                at, job = at + 1, 0
    return found


@settings(max_examples=150, deadline=None)
@given(LENGTHS, GROUPS, st.sampled_from([1, 2, 8]), SHARES)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_every_tile_is_in_one_piece_that_is_long_enough(
    window: int | None, lengths: list[tuple[int, int]], group: int, heads: int, num_shares: int
) -> None:
    plan = plan_decode(*_arrays(lengths), group=group, num_kv_heads=heads, num_shares=num_shares, window=window)
    new = {sequence: (count, count + before) for sequence, (count, before) in enumerate(lengths) if count}
    assert plan.sequences[:, 0].tolist() == list(new)
    wanted = {}
    for at, (count, length) in enumerate(new.values()):
        first = 0 if window is None else max(0, length - count + 1 - window)
        assert plan.sequences[at, 5] == first // 16
        for job in range(-(-count * group // 16) * heads):
            wanted[at, job] = -(-length // 16) - first // 16
    seen: dict[tuple[int, int], int] = dict.fromkeys(wanted, 0)
    for at, job, begin, end, _ in _pieces(plan, heads):
        assert begin == seen[at, job]  # in order, without a gap
        assert end - begin >= min(MIN_PIECE, wanted[at, job])
        seen[at, job] = end
    assert seen == wanted


@settings(max_examples=150, deadline=None)
@given(LENGTHS, GROUPS, st.sampled_from([1, 2, 8]), SHARES)
def test_states_follow_each_other_and_are_bounded(
    lengths: list[tuple[int, int]], group: int, heads: int, num_shares: int
) -> None:
    query_start, seq_lens = _arrays(lengths)
    begins = np.where(seq_lens > 64, 64, 0).astype(np.int32)
    plan = plan_decode(query_start, seq_lens, group=group, num_kv_heads=heads, num_shares=num_shares, begins=begins)
    assert plan.num_states <= 2 * num_shares
    assert len(plan.merges) < num_shares
    states: dict[tuple[int, int], list[int]] = {}
    for at, job, _, _, state in _pieces(plan, heads):
        if state >= 0:
            states.setdefault((at, job), []).append(state)
    assert sorted(state for some in states.values() for state in some) == list(range(plan.num_states))
    wanted = []
    for (at, job), some in states.items():
        _, first_row, rows, _, begin, _, _, row_tiles = plan.sequences[at].tolist()
        assert some == list(range(some[0], some[0] + len(some)))
        packed = job % row_tiles * 16
        wanted.append(
            [first_row, packed, min(16, rows * group - packed), job // row_tiles, some[0], len(some), int(begin > 0), 0]
        )
    assert plan.merges.tolist() == wanted


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 8]), SHARES)
def test_nobody_has_much_more_than_an_equal_share(lengths: list[tuple[int, int]], heads: int, num_shares: int) -> None:
    plan = plan_decode(*_arrays(lengths), group=4, num_kv_heads=heads, num_shares=num_shares)
    tiles = plan.shares[:, 3]
    assert tiles.max() <= -(-tiles.sum() // num_shares) + 2 * (MIN_PIECE - 1) + 1


def test_a_lone_sequence_keeps_every_block_busy() -> None:
    plan = plan_decode(np.array([0, 1]), np.array([131072]), group=4, num_kv_heads=8, num_shares=264)
    assert plan.shares[:, 3].min() >= 240
    assert plan.shares[:, 3].max() <= 256  # 8 heads x 8192 tiles / 264 = 248
    assert len(plan.merges) == 8


def test_short_sequences_are_spread_and_not_cut() -> None:
    plan = plan_decode(np.arange(17), np.full(16, 100), group=4, num_kv_heads=8, num_shares=264)
    assert (plan.shares[:128, 3] == 7).all()
    assert (plan.shares[128:, 3] == 0).all()
    assert plan.num_states == 0


def test_only_chosen_sequences_are_planned() -> None:
    chosen = np.array([True, False, True, True])  # the last has no new tokens
    plan = plan_decode(
        np.array([0, 1, 40, 41, 41]), np.array([50, 60, 70, 80]), group=1, num_kv_heads=1, num_shares=4, chosen=chosen
    )
    assert plan.sequences[:, :2].tolist() == [[0, 0], [2, 40]]
    nobody = plan_decode(np.array([0, 1]), np.array([5]), group=1, num_kv_heads=1, num_shares=4, chosen=np.array([False]))
    assert not nobody.shares.any()
    assert nobody.merges.shape == (0, 8)


def test_a_sequence_without_tokens_has_a_tile_of_nothing() -> None:
    plan = plan_decode(np.array([0, 2]), np.array([0]), group=4, num_kv_heads=2, num_shares=4, window=8)
    assert plan.sequences.tolist() == [[0, 0, 2, 0, 0, 0, 1, 1]]
    assert plan.shares[:, 3].sum() == 2


def test_tokens_that_are_attended_to_elsewhere_have_no_tiles() -> None:
    plan = plan_decode(
        np.array([0, 1, 2]), np.array([100, 100]), group=1, num_kv_heads=1, num_shares=1, begins=np.array([64, 0]), window=90
    )
    assert plan.sequences[:, 4:7].tolist() == [[64, 4, 3], [0, 0, 7]]


def test_equal_lengths_give_equal_plans() -> None:
    random = np.random.default_rng(0)
    query_start, seq_lens = np.arange(65), random.integers(1, 5000, 64)
    one, other = (plan_decode(query_start, seq_lens, group=4, num_kv_heads=8, num_shares=264) for _ in range(2))
    assert (one.shares == other.shares).all()
    assert (one.merges == other.merges).all()

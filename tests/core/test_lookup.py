"""Proposals by look-up in a request's own tokens."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streamkv.core.lookup import PromptLookup


def test_what_followed_the_same_tokens_before_is_proposed() -> None:
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4], 0, 9) == [5, 6, 9, 1]


def test_the_latest_place_and_the_longest_match_count() -> None:
    assert PromptLookup().propose([7, 8, 1, 7, 8, 2, 7, 8], 0, 1) == [2]
    assert PromptLookup().propose([1, 2, 7, 8, 5, 7, 8, 6, 1, 2, 7, 8], 0, 1) == [5]


def test_a_proposal_begins_behind_what_is_being_computed() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4]
    assert PromptLookup().propose(tokens, 1, 2) == [6, 9]


def test_a_piece_that_repeats_itself_goes_on() -> None:
    assert PromptLookup().propose([5, 1, 2, 1, 2], 0, 4) == [1, 2, 1, 2]
    assert PromptLookup().propose([5, 1, 2, 1, 2], 1, 4) == [2, 1, 2, 1]


def test_nothing_comes_of_nothing() -> None:
    lookup = PromptLookup()
    assert lookup.propose([], 0, 4) == []
    assert lookup.propose([1], 0, 4) == []
    assert lookup.propose([1, 2], 0, 4) == []
    assert lookup.propose([1, 2, 3, 4], 0, 4) == []
    assert lookup.propose([1, 2, 1, 2], 0, 0) == []


def test_proposals_grow_with_success_and_shrink_to_what_was_right() -> None:
    lookup = PromptLookup()
    tokens = list(range(40)) + list(range(10))
    assert len(lookup.propose(tokens, 0, 99)) == 4
    lookup.learn(50, 4, 4)
    assert len(lookup.propose(tokens, 0, 99)) == 8
    lookup.learn(50, 8, 8)
    lookup.learn(50, 16, 16)
    assert len(lookup.propose(tokens, 0, 99)) == 16
    lookup.learn(50, 16, 5)
    assert len(lookup.propose(tokens, 0, 99)) == 5
    lookup.learn(50, 5, 0)
    assert len(lookup.propose(tokens, 0, 99)) == 1


def test_it_pauses_where_it_does_not_pay_each_time_for_longer() -> None:
    lookup = PromptLookup()
    tokens = [1, 2] * 100
    asked = []
    for length in range(4, 200):
        if proposed := lookup.propose(tokens[:length], 0, 9):
            asked.append(length)
            lookup.learn(length, len(proposed), 0)
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert gaps[:9] == [1, 1, 8, 1, 1, 16, 1, 1, 32]
    lookup.learn(200, 4, 1)
    assert lookup.propose([1, 2] * 200, 0, 9), "one that is right ends it"


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 2), st.integers(0, 20), st.data())
def test_fed_piece_by_piece_it_says_the_same(tokens: list[int], pending: int, most: int, data: st.DataObject) -> None:
    """And only what has followed, at its latest place, the last two or four tokens."""
    grown, at = PromptLookup(), 0
    while at < len(tokens):
        at += data.draw(st.integers(1, 7))
        grown.propose(tokens[:at], 0, 4)
    proposed = PromptLookup().propose(tokens, pending, most)
    assert grown.propose(tokens, pending, most) == proposed
    assert len(proposed) <= most
    if proposed:
        whole = tokens + [-1] * pending + proposed
        size = next(n for n in (4, 2) if any(tokens[i : i + n] == tokens[-n:] for i in range(len(tokens) - n)))
        place = max(i for i in range(len(tokens) - size) if tokens[i : i + size] == tokens[-size:]) + size
        for offset, token in enumerate(proposed, pending):
            said = whole[place + offset]
            assert said in (token, -1)

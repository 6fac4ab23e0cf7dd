"""What can be sent again, and exactly what, against a list that never forgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.protocol import messages as m
from streamkv.protocol.ring import Ring

COUNTS = st.lists(st.integers(0, 6), max_size=12)
"""Tokens of chunks; at most one chunk without tokens at an offset, as streams make them."""


def chunks_of(counts: list[int], base: int) -> list[m.Delta]:
    chunks: list[m.Delta] = []
    for number, count in enumerate(counts):
        offset = chunks[-1].o + chunks[-1].n if chunks else base
        if count or not chunks or chunks[-1].n:
            chunks.append(m.Delta("s", offset, count, f"<{number}>"))
    return chunks


def filled(counts: list[int], base: int = 0) -> tuple[Ring, list[m.Delta]]:
    ring, chunks, chars = Ring(base), chunks_of(counts, base), 0
    for chunk in chunks:
        chars += len(chunk.x)
        ring.push(chunk, len(chunk.x), chars)
    return ring, chunks


@given(counts=COUNTS, base=st.integers(0, 9), acks=st.lists(st.integers(0, 60), max_size=4), keep=st.integers(0, 40))
def test_every_border_that_is_kept_can_be_resumed_and_nothing_else(counts: list[int], base: int, acks: list[int], keep: int):
    ring, chunks = filled(counts, base)
    end = chunks[-1].o + chunks[-1].n if chunks else base
    borders = {base} | {chunk.o + chunk.n for chunk in chunks}
    confirmed = base
    for ack in acks:
        ring.trim(min(ack, end))
        confirmed = max(confirmed, min(ack, end))
    ring.shrink(keep)
    assert ring.num_tokens <= keep or not chunks
    first = max(border for border in borders if border <= confirmed)
    first = max(first, min(border for border in borders if end - border <= keep))
    for offset in range(base - 2, end + 3):
        expected = [chunk for chunk in chunks if chunk.o >= offset]
        found = ring.since(offset)
        if offset in borders and offset >= first:
            assert [chunk.n for chunk in found or [] if chunk.n] == [chunk.n for chunk in expected if chunk.n]
            assert found is not None
            assert found[-1:] == expected[-1:] or not expected[-1].n
        else:
            assert found is None, f"token {offset} is no border that is kept"


@given(counts=COUNTS, ack=st.integers(0, 60))
def test_bytes_are_those_of_the_chunks_that_are_left(counts: list[int], ack: int):
    ring, chunks = filled(counts)
    ring.trim(ack)
    left = ring.since(ring.start) or []
    assert len(left) <= len(chunks)
    assert ring.bytes == sum(len(chunk.x) + 200 for chunk in left)
    ring.shrink(0)
    if ring.num_tokens == 0 and not any(not chunk.n for chunk in left):
        assert ring.bytes == 0


def test_a_last_chunk_without_tokens_comes_again_with_its_offset():
    """The characters that a stop string had held back come after the last token; who has all tokens may lack them."""
    ring, chunks = filled([3, 2, 0])
    ring.trim(5)
    assert ring.since(5) == [chunks[2]]
    assert ring.since(3) is None


def test_an_echo_is_confirmed_by_the_first_token_after_it():
    ring, chunks = filled([0, 3, 2])
    assert ring.since(0) == chunks
    ring.trim(1)
    assert ring.since(0) == chunks[1:]
    ring.trim(3)
    assert ring.since(0) is None
    assert ring.since(3) == chunks[2:]


@pytest.mark.parametrize("offset", [-1, 1, 2, 4, 6, 2**53])
def test_what_is_no_border_is_refused(offset: int):
    ring, _ = filled([3, 2])
    assert ring.since(offset) is None


@given(counts=COUNTS, base=st.integers(0, 9))
def test_characters_are_known_at_the_ends_of_chunks(counts: list[int], base: int):
    ring, chunks = filled(counts, base)
    for offset in range(base - 1, base + sum(counts) + 2):
        text = "".join(chunk.x for chunk in chunks if chunk.o + chunk.n <= offset)
        if any(chunk.o + chunk.n == offset for chunk in chunks):
            assert ring.chars_at(offset) == len(text)
        else:
            assert ring.chars_at(offset) is None

"""The state table is the only way to move."""

from __future__ import annotations

from itertools import product

import pytest

from streamkv.core.request import TRANSITIONS, IllegalTransitionError, Request, State, StopRule


def request(credit: int | None = None) -> Request:
    return Request("r", [1, 2, 3], StopRule(4), arrival=0, credit=credit)


LEGAL = {
    ("waiting", "running"),
    ("waiting", "finished"),
    ("running", "preempted"),
    ("running", "finished"),
    ("preempted", "running"),
    ("preempted", "finished"),
}


@pytest.mark.smoke
@pytest.mark.parametrize(("start", "end"), list(product(State, State)), ids=lambda state: state.value)
def test_every_move_is_legal_or_raises(start: State, end: State) -> None:
    subject = request()
    subject.state = start
    if (start.value, end.value) in LEGAL:
        subject.move(end)
        assert subject.state is end
    else:
        with pytest.raises(IllegalTransitionError, match=f"{start.value} -> {end.value}"):
            subject.move(end)


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)


def test_parked_counts_tokens_in_flight() -> None:
    subject = request(credit=2)
    subject.tokens.append(7)
    assert not subject.parked
    subject.pending = 1
    assert subject.parked
    assert not request().parked


def test_length_counts_output_only() -> None:
    subject = request()
    assert (subject.num_output, subject.limit) == (0, 7)
    assert "waiting tokens=3 computed=0" in repr(subject)

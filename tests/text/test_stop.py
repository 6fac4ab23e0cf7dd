"""Stop strings: never leaked, nothing lost before them, and the result does not depend on how the text was cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.text.stop import StopStrings

# A small alphabet, so that stops overlap and nearly match all the time; one letter of four UTF-8 bytes, one combining mark.
letters = st.sampled_from("ab🙂\u0301")
stop_lists = st.lists(st.text(letters, min_size=1, max_size=4), min_size=1, max_size=4)
cut_texts = st.lists(st.text(letters, max_size=4), max_size=12)


def oracle(text: str, stops: list[str], *, include: bool = False, unarmed: int = 0) -> tuple[str, bool]:
    """One character after the other: the first stop string to complete ends the text; of several, the longest.

    Before `unarmed` characters none counts.
    """
    for end in range(unarmed + 1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end if include else end - max(map(len, done))], True
    return text, False


def stream(pieces: list[str], stops: list[str], *, include: bool = False, unarmed: int = 0) -> tuple[list[str], bool]:
    """Everything released, piece by piece and then at the end; the first `unarmed` pieces cannot end the text."""
    finder = StopStrings(stops, include=include)
    released = [finder.push(piece, armed=index >= unarmed) for index, piece in enumerate(pieces)]
    return [*released, finder.finish()], finder.stopped


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["ab", "c"], "abc"),
        (["STOP"], ["one STOP two"], "one "),
        (["STOP"], list("one STOP two"), "one "),
        (["STOP"], ["one ST"], "one ST"),
        (["STOP"], ["STO", "STOP"], "STO"),
        (["aab"], ["aa", "ab", "x"], "a"),
        (["abc", "b"], ["abc"], "a"),
        (["bc", "abc"], ["a", "bc"], ""),
        (["\n\n"], ["x\n", "y\n", "\nz"], "x\ny"),
        (["🙂🙃"], ["a🙂", "🙂", "🙃b"], "a🙂"),
        (["e\u0301"], ["caf", "e", "\u0301", "!"], "caf"),
        (["日本"], ["日", "日", "本"], "日"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], expected: str) -> None:
    assert "".join(stream(pieces, stops)[0]) == expected


@given(pieces=cut_texts, stops=stop_lists, include=st.booleans(), unarmed=st.integers(0, 6))
def test_as_the_oracle_however_the_text_is_cut(pieces: list[str], stops: list[str], include: bool, unarmed: int) -> None:
    released, stopped = stream(pieces, stops, include=include, unarmed=unarmed)
    before = len("".join(pieces[:unarmed]))
    assert ("".join(released), stopped) == oracle("".join(pieces), stops, include=include, unarmed=before)


@pytest.mark.parametrize(
    ("stops", "pieces", "unarmed", "expected", "stopped"),
    [
        (["STOP"], ["a STOP b", " STOP c"], 1, "a STOP b ", True),  # the first that counts
        (["STOP"], ["a ST", "OP c"], 1, "a ", True),  # begun before, completed after
        (["STOP"], ["a STOP", " b"], 1, "a STOP b", False),
        (["aa"], ["aa", "a"], 1, "a", True),  # the end of one that did not count
        (["abc", "b"], ["ab", "x"], 1, "abx", False),  # in what was held back
        (["abc", "b"], ["ab", "c"], 1, "", True),
        (["STOP"], ["STOP", "STOP"], 2, "STOPSTOP", False),
    ],
)
def test_stops_count_once_they_are_armed(stops: list[str], pieces: list[str], unarmed: int, expected: str, stopped: bool) -> None:
    released, found = stream(pieces, stops, unarmed=unarmed)
    assert ("".join(released), found) == (expected, stopped)


def test_text_that_passed_unarmed_is_released_at_once() -> None:
    finder = StopStrings(["STOP"])
    assert finder.push("a STOP b", armed=False) == "a STOP b"
    assert finder.push(" ST", armed=False) == " "
    assert finder.push("x") == "STx"
    assert StopStrings(["longer", "ab"]).push("ab", armed=False) == "ab"


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["STOP"], ["one ST", "OP two"], "one STOP"),
        (["STOP", "ST"], ["one STOP"], "one ST"),
        (["bc", "abc"], ["a", "bc", "d"], "abc"),
    ],
)
def test_the_text_can_end_with_the_stop_string(stops: list[str], pieces: list[str], expected: str) -> None:
    assert "".join(stream(pieces, stops, include=True)[0]) == expected


@given(pieces=cut_texts, stops=stop_lists)
def test_no_stop_string_is_ever_seen(pieces: list[str], stops: list[str]) -> None:
    released, _ = stream(pieces, stops)
    assert not any(stop in "".join(released) for stop in stops)


@given(pieces=cut_texts, stops=stop_lists)
def test_no_more_is_held_back_than_could_still_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    finder, given_text, seen = StopStrings(stops), "", ""
    for piece in pieces:
        given_text += piece
        seen += finder.push(piece)
        if finder.stopped:
            return
        held = given_text[len(seen) :]
        assert held == "" or any(len(held) < len(stop) and stop.startswith(held) for stop in stops)


@given(pieces=cut_texts, more=cut_texts, stops=stop_lists)
def test_nothing_follows_a_stop(pieces: list[str], more: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    for piece in pieces:
        finder.push(piece)
    if finder.stopped:
        assert [finder.push(piece) for piece in more] == [""] * len(more)
        assert finder.finish() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    finder = StopStrings([])
    assert finder.push("a") == "a"
    assert finder.finish() == ""
    assert not finder.stopped


def test_a_long_text_of_near_misses_costs_no_more_than_its_length() -> None:
    """Held-back text is bounded by the longest stop string, whatever comes."""
    stop = "a" * 63 + "b"
    finder = StopStrings([stop])
    for _ in range(2000):
        finder.push("a")
        assert len(finder._held) < 64
    assert finder.push("b") == ""
    assert finder.stopped

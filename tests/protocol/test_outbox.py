"""When text is sent, what is merged, who comes first, and the signs of life: with a clock of our own."""

from __future__ import annotations

import pytest

from streamkv.protocol import messages as m
from streamkv.protocol.outbox import Outbox, OutStream, SessionLimits
from streamkv.sampling_params import TokenLogprobs
from streamkv.text.events import Delta

LIMITS = SessionLimits(flush_tokens=8, flush_bytes=64, flush_s=0.020, flush_busy_s=0.050, heartbeat_s=20.0, control=3)


def outbox(*names: str) -> tuple[Outbox, list[OutStream]]:
    made = Outbox(LIMITS)
    streams = [OutStream(name, 0.0) for name in names]
    for stream in streams:
        made.streams[stream.id] = stream
        made.open(stream, m.Accepted(stream.id, "r"))
        assert made.next_message(0.0, busy=False) == m.Accepted(stream.id, "r")
    return made, streams


def feed(made: Outbox, stream: OutStream, text: str, now: float, count: int = 1) -> None:
    made.text(stream, Delta(stream.id, 0, count, text, ()), now)


def drained(made: Outbox, now: float, *, busy: bool = False) -> list[m.ServerMessage]:
    messages = []
    while (message := made.next_message(now, busy=busy)) is not None:
        messages.append(message)
    return messages


def started(*names: str) -> tuple[Outbox, list[OutStream]]:
    """Streams whose first token has gone out at time 0."""
    made, streams = outbox(*names)
    for stream in streams:
        feed(made, stream, "x", 0.0)
    assert [message.x for message in drained(made, 0.0)] == ["x"] * len(names)
    return made, streams


def test_the_first_token_waits_for_nothing():
    made, (stream,) = outbox("s")
    feed(made, stream, "x", 5.0)
    assert made.next_due(5.0, busy=True) == 0.0
    assert drained(made, 5.0, busy=True) == [m.Delta("s", 0, 1, "x")]


@pytest.mark.parametrize(("busy", "wait"), [(False, 0.020), (True, 0.050)])
def test_later_tokens_wait_to_be_merged(busy: bool, wait: float):
    made, (stream,) = started("s")
    feed(made, stream, "a", 1.0)
    feed(made, stream, "b", 1.01)
    assert made.next_due(1.01, busy=busy) == pytest.approx(wait - 0.01)
    assert drained(made, 1.0 + wait - 0.001, busy=busy) == []
    assert drained(made, 1.0 + wait + 0.001, busy=busy) == [m.Delta("s", 1, 2, "ab")]


@pytest.mark.parametrize("enough", [[("y", 1)] * 8, [("y" * 64, 1)], [("é" * 32, 1)], [("y", 8)]])
def test_enough_tokens_or_bytes_are_sent_at_once(enough: list[tuple[str, int]]):
    made, (stream,) = started("s")
    for text, count in enough[:-1]:
        feed(made, stream, text, 1.0, count)
    assert drained(made, 1.0) == []
    feed(made, stream, enough[-1][0], 1.0, enough[-1][1])
    (delta,) = drained(made, 1.0)
    assert delta.x == "".join(text for text, _ in enough)


def test_the_end_flushes_and_comes_last():
    made, (stream,) = started("s")
    feed(made, stream, "a", 1.0)
    end = m.Error("internal", "x", "s")
    made.end(stream, end)
    assert drained(made, 1.0) == [m.Delta("s", 1, 1, "a"), end]
    assert made.streams == {}
    assert made.next_due(1.0, busy=False) is None


def test_answers_come_before_text_and_streams_take_turns():
    made, (first, second, third) = outbox("1", "2", "3")
    for text in "ab":
        for stream in (first, second, third):
            feed(made, stream, text * 80, 0.0)
    made.say(m.Pong(1.0, 0.0))
    assert made.next_message(7.0, busy=False) == m.Pong(1.0, 7.0)
    assert made.next_message(7.0, busy=False).id == "1"
    feed(made, first, "c" * 80, 7.0)
    assert [message.id for message in drained(made, 7.0)] == ["2", "3", "1"]


def test_text_of_a_stream_that_is_not_accepted_waits():
    made = Outbox(LIMITS)
    stream = made.streams["s"] = OutStream("s", 0.0)
    feed(made, stream, "x", 0.0)
    made.status(stream, m.Status("s", "decode"))
    assert drained(made, 1.0) == []
    made.open(stream, m.Accepted("s", "r"))
    assert [type(message) for message in drained(made, 1.0)] == [m.Accepted, m.Status, m.Delta]


def test_of_several_states_the_last_is_told_with_the_cached_tokens():
    made, (stream,) = outbox("s")
    made.status(stream, m.Status("s", "prefill", 12))
    made.status(stream, m.Status("s", "decode"))
    assert drained(made, 0.0) == [m.Status("s", "decode", 12)]


def test_who_is_silent_tells_its_state_again_and_again():
    made, (first, second) = outbox("1", "2")
    made.status(second, m.Status("2", "prefill", 0))
    drained(made, 10.0)
    assert made.next_due(10.0, busy=False) == pytest.approx(10.0)
    assert drained(made, 20.5) == [m.Status("1", "queued")]
    assert made.next_due(20.5, busy=False) == pytest.approx(9.5)
    assert drained(made, 30.5) == [m.Status("2", "prefill")]
    assert drained(made, 41.0) == [m.Status("1", "queued")]
    feed(made, first, "x", 45.0)
    drained(made, 45.0)
    assert drained(made, 51.0) == [m.Status("2", "prefill")]
    assert made.next_due(51.0, busy=False) == pytest.approx(14.0)


def test_log_probabilities_count_as_waiting_bytes():
    made, (stream,) = started("s")
    entry = TokenLogprobs(-1.0, tuple((token, -2.0) for token in range(20)))
    made.text(stream, Delta("s", 1, 4, "", (1, 2, 3, 4), (entry,) * 4), 1.0)
    assert made.bytes >= 4 * 20 * 16
    (delta,) = drained(made, 2.0)
    assert len(delta.lp) == 4
    assert made.bytes == 0


def test_crowded_until_the_answers_are_taken():
    made = Outbox(LIMITS)
    for number in range(3):
        assert not made.crowded
        made.say(m.Pong(number, 0.0))
    assert made.crowded
    made.next_message(0.0, busy=False)
    assert not made.crowded


def test_text_without_tokens_waits_for_the_next_ones_or_the_end():
    """Offsets tell chunks apart: only an echo and what comes after the last token are chunks without tokens."""
    made, (stream,) = started("s")
    feed(made, stream, "a", 1.0, 0)
    assert drained(made, 9.0) == []
    feed(made, stream, "b", 9.0)
    assert drained(made, 10.0) == [m.Delta("s", 1, 1, "ab")]
    feed(made, stream, "c", 11.0, 0)
    assert drained(made, 12.0) == []
    end = m.Error("internal", "x", "s")
    made.end(stream, end)
    assert drained(made, 12.0) == [m.Delta("s", 2, 0, "c"), end]


def test_what_a_stream_without_a_connection_says_waits_in_chunks_and_weighs_nothing():
    made, (stream,) = started("s")
    made.clear()
    stream.attached = False
    for number in range(130):
        feed(made, stream, "y", 1.0 + number)
    assert (made.bytes, drained(made, 1000.0)) == (0, [])
    assert stream.resume(1)
    assert [chunk.n for chunk in stream.replay] == [64, 64, 2]
    made.attach(stream, 1000.0)
    assert made.bytes == 0
    assert "".join(chunk.x for chunk in drained(made, 1000.0)) == "y" * 130

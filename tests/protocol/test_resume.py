"""Credit, resume and fork on a session without sockets, case by case, each with a clock of its own."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import pytest

from streamkv.errors import OverloadedError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, GrantCredit, OpenStreams
from streamkv.protocol.bodies import ParsedBody
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.session import Session
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs
from streamkv.text.events import Delta, Finished, PromptRead, Score, Status, StreamEvent, Timings

CODEC = m.CODECS["streamkv.v1.json"]
TIMINGS = Timings(0.1, 0.2, 0.3, 0.4)


class Talk:
    """A session whose messages have been taken up to now, and whose engine opens whatever is asked for."""

    def __init__(self, **limits: Any) -> None:
        self.now = 100.0
        self.limits = SessionLimits(**limits)
        self.session = Session(
            CODEC,
            self.limits,
            session_id="s",
            epoch="e",
            server="t",
            models=("fake",),
            max_model_len=100_000,
            now=self.now,
        )
        self.actions: list[Action] = []
        self.keys: dict[str, str] = {}  # of each id the latest
        self.offsets: dict[str, int] = {}
        assert isinstance(self.take()[0], m.Welcome)

    def send(self, **message: Any) -> list[Action]:
        if "from_" in message:
            message["from"] = message.pop("from_")
        return self.done(self.session.receive(CODEC.encode(message), is_text=True, now=self.now))

    def done(self, actions: list[Action]) -> list[Action]:
        self.actions += actions
        return actions

    def create(self, *ids: str, opened: bool = True, api: str = "completions", **fields: Any) -> list[Action]:
        body = fields.pop("body", {"prompt": "p"})
        return self._made(self.send(t="create", api=api, ids=list(ids), body=body, **fields), opened)

    def fork(self, source: str, *ids: str, **fields: Any) -> OpenStreams:
        (wish,) = self._made(self.send(t="fork", from_=source, ids=list(ids), **fields), True)
        assert isinstance(wish, OpenStreams)
        for stream_id in ids:
            self.offsets[stream_id] = 0
        return wish

    def _made(self, actions: list[Action], opened: bool) -> list[Action]:
        for wish in actions:
            if isinstance(wish, OpenStreams):
                for key in wish.keys:
                    self.keys[key.partition("#")[0]] = key
                    if opened:
                        record = f"record of {key}" if isinstance(wish.body, ParsedBody) else None
                        self.done(self.session.opened(key, "r", 3, record, now=self.now))
        return actions

    def says(self, stream_id: str, *events: Any) -> list[Action]:
        """Events of one step: texts (a token a word), states, or an end (a dictionary)."""
        made: list[StreamEvent] = []
        for event in events:
            key, offset = self.keys[stream_id], self.offsets.get(stream_id, 0)
            if isinstance(event, dict):
                made.append(Finished(key, event["reason"], 3, offset, 0, TIMINGS))
            elif event in ("prefill", "decode", "stalled", "preempted"):
                by_then = offset + sum(len(other.split()) for other in events if isinstance(other, str) and other.endswith(" "))
                made.append(Status(key, event, tokens=by_then))
            else:
                count = len(event.split())
                made.append(Delta(key, offset, count, event, tuple(range(offset, offset + count))))
                self.offsets[stream_id] = offset + count
        return self.done(self.session.events(made, self.now))

    def ends(self, stream_id: str) -> list[Action]:
        return self.says(stream_id, {"reason": "stop"})

    def take(self, *kinds: type) -> list[Any]:
        """All that is due, of these kinds if any are named."""
        messages = []
        while (message := self.session.next_message(self.now)) is not None:
            messages.append(message)
        return [message for message in messages if not kinds or isinstance(message, kinds)]

    def cut(self) -> list[Action]:
        return self.done(self.session.detach(self.now))

    def come_back(self) -> None:
        self.session.attach(CODEC, self.now)
        (welcome,) = self.take()
        assert welcome.resumed

    def tick(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.done(self.session.tick(self.now))

    def cancelled(self) -> set[str]:
        return {action.key for action in self.actions if isinstance(action, CancelStream)}


# -- credit -------------------------------------------------------------------------------------------------------


def test_who_grants_nothing_is_ended():
    talk = Talk(stall_s=120.0)
    talk.create("a", max=2)
    talk.says("a", "decode", "stalled", "x y ")
    assert [type(message) for message in talk.take()] == [m.Accepted, m.Status, m.Delta]
    assert talk.session.next_tick() == talk.now + 120.0
    assert talk.tick(119.0) == []
    assert talk.tick(1.0) == [CancelStream(talk.keys["a"])]
    (error,) = talk.take()
    assert (error.code, error.id, error.retryable) == ("stalled_timeout", "a", True)


def test_credit_that_crosses_the_news_of_a_stall_keeps_the_stream_alive():
    """Even if no further token comes for longer than a stall may last: it may have lost its blocks and wait for others."""
    talk = Talk(stall_s=120.0)
    talk.create("a", max=2)
    talk.says("a", "decode", "x ")
    assert talk.send(t="credit", id="a", max=m.MAX_CREDIT) == [GrantCredit(talk.keys["a"], m.MAX_CREDIT)]
    talk.says("a", "stalled", "y ")
    talk.says("a", "preempted")
    assert talk.session.next_tick() == math.inf
    assert talk.tick(1000.0) == []
    assert [message.state for message in talk.take() if isinstance(message, m.Status)] == ["preempted"]


def test_a_stall_is_over_when_credit_grew_while_the_request_was_on_its_way():
    """The engine's first words may come before the answer that it has taken the request, and with that the grant."""
    talk = Talk(stall_s=120.0)
    talk.create("a", max=2, opened=False)
    talk.send(t="credit", id="a", max=9)
    talk.says("a", "decode", "stalled", "x y ")
    assert talk.session.opened(talk.keys["a"], "r", 3, now=talk.now) == [GrantCredit(talk.keys["a"], 9)]
    assert talk.tick(1000.0) == []
    assert [message.state for message in talk.take(m.Status, m.Error)] == ["decode"]


def test_a_stalled_stream_that_loses_its_blocks_is_still_stalled():
    talk = Talk(stall_s=120.0)
    talk.create("a", max=1)
    talk.says("a", "decode", "stalled", "x ")
    talk.says("a", "preempted")
    assert talk.tick(120.0) == [CancelStream(talk.keys["a"])]


def test_a_stream_that_may_not_even_begin_is_stalled_too():
    """The engine lets it sleep and says nothing of it."""
    talk = Talk(stall_s=120.0)
    talk.create("a", max=0)
    assert talk.take()[1:] == [m.Status("a", "stalled")]
    talk.send(t="credit", id="a", max=3)
    assert talk.tick(500.0) == []
    talk.create("b", max=0)
    assert talk.tick(120.0) == [CancelStream(talk.keys["b"])]


def test_a_state_that_was_told_is_told_no_longer_once_there_is_credit():
    talk = Talk(heartbeat_s=20.0)
    talk.create("a", max=1)
    talk.says("a", "decode", "stalled", "x ")
    talk.take()
    talk.send(t="credit", id="a", max=9)
    talk.now += 21.0
    assert talk.take() == [m.Status("a", "decode")]


def test_credit_is_counted_from_the_start_of_a_fork():
    talk = Talk()
    talk.create("a")
    talk.says("a", "1 2 3 4 ")
    wish = talk.fork("a", "b", at=4, max=7)
    assert wish.credit == 3
    assert talk.send(t="credit", id="b", max=10) == [GrantCredit(talk.keys["b"], 6)]
    assert talk.send(t="credit", id="b", max=9) == []


def test_the_time_of_who_may_not_even_begin_counts_from_when_its_request_was_there():
    talk = Talk(stall_s=120.0)
    talk.create("a", max=0, opened=False)
    talk.now += 100.0
    talk.session.opened(talk.keys["a"], "r", 3, now=talk.now)
    assert talk.session.next_tick() == talk.now + 120.0


@pytest.mark.parametrize("raised", [False, True])
def test_credit_that_grew_while_the_request_was_on_its_way_is_granted(raised: bool):
    talk = Talk()
    talk.create("a", max=2, opened=False)
    if raised:
        talk.send(t="credit", id="a", max=9)
    assert talk.session.opened(talk.keys["a"], "r", 3, now=talk.now) == [GrantCredit(talk.keys["a"], 9 if raised else 2)]


@pytest.mark.parametrize("how", ["cancel", "lost"])
def test_what_was_ended_while_the_request_was_on_its_way_is_cancelled_once_it_is_there(how: str):
    """The engine ignores a cancel of what it does not know yet."""
    talk = Talk()
    talk.create("a", opened=False, on_disconnect="cancel")
    ended = talk.send(t="cancel", id="a") if how == "cancel" else talk.cut()
    assert ended == [CancelStream(talk.keys["a"])]
    assert talk.session.opened(talk.keys["a"], "r", 3, now=talk.now) == [CancelStream(talk.keys["a"])]


# -- away ---------------------------------------------------------------------------------------------------------


def test_a_stall_does_not_make_the_grace_longer():
    talk = Talk(grace_s=15.0)
    talk.create("a", max=2)
    talk.says("a", "decode", "x ")
    talk.cut()
    talk.now += 10.0
    talk.says("a", "stalled", "y ")
    assert talk.session.next_tick() == talk.now + 5.0
    assert talk.tick(5.0) == [CancelStream(talk.keys["a"])]
    assert talk.session.closed


def test_who_comes_back_has_the_whole_time_to_grant():
    talk = Talk(grace_s=300.0, stall_s=120.0)
    talk.create("a", max=1)
    talk.says("a", "decode", "stalled", "x ")
    talk.cut()
    talk.now += 200.0
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    assert talk.tick(119.0) == []
    assert talk.tick(1.0) == [CancelStream(talk.keys["a"])]


def test_those_who_wait_start_when_a_wrong_resume_ends_a_stream():
    talk = Talk(streams=1)
    talk.create("a")
    talk.create("b", opened=False)
    talk.cut()
    talk.come_back()
    cancel, start = talk.send(t="resume", id="a", from_=7)
    assert cancel == CancelStream(talk.keys["a"])
    assert start.keys == ("b#1",)


def test_those_who_wait_start_when_the_connection_of_an_impatient_one_is_lost():
    talk = Talk(streams=1)
    talk.create("a", on_disconnect="cancel")
    talk.create("b", opened=False)
    cancel, start = talk.cut()
    assert cancel == CancelStream(talk.keys["a"])
    assert start.keys == ("b#1",)


def test_what_waited_for_a_lost_client_does_not_make_the_next_one_slow():
    talk = Talk(outbound=1000)
    talk.create("a")
    talk.cut()
    for number in range(300):
        talk.says("a", f"{number} ")
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    talk.says("a", "last ")
    assert not talk.session.too_slow
    talk.now += 1.0
    deltas = talk.take(m.Delta)
    assert [delta.n for delta in deltas] == [64, 64, 64, 64, 44, 1]
    assert "".join(delta.x for delta in deltas) == "".join(f"{number} " for number in range(300)) + "last "


def test_what_is_longer_than_the_ring_is_not_computed_for_nobody():
    talk = Talk(ring=10)
    talk.create("a")
    talk.cut()
    assert talk.says("a", "1 2 3 4 5 6 7 8 9 10 ") == []
    assert talk.says("a", "11 ") == [CancelStream(talk.keys["a"])]


def test_what_is_given_up_in_the_step_that_ends_it_is_cancelled_all_the_same():
    """The cancel crosses with the end, as a client's may; it is for nobody."""
    talk = Talk(ring=4)
    talk.create("a")
    talk.cut()
    assert talk.says("a", "1 2 3 4 5 ", {"reason": "stop"}) == [CancelStream(talk.keys["a"])]
    talk.tick(0.0)
    assert talk.session.closed


def test_a_refusal_is_kept_for_its_whole_time_from_when_it_came():
    """Not from when the session was last told the time, which was when the connection was lost."""
    talk = Talk(resume_s=60.0, grace_s=15.0)
    talk.create("a", opened=False)
    talk.cut()
    talk.now += 10.0
    talk.session.refused((talk.keys["a"],), OverloadedError("later"), talk.now)
    assert talk.tick(59.0) == []
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    assert [type(message) for message in talk.take()] == [m.Resumed, m.Error]


def test_a_reader_that_confirms_nothing_has_a_ring_of_bounded_size():
    talk = Talk(ring=4)
    talk.create("a")
    for text in ("1 2 ", "3 4 ", "5 6 "):
        talk.says("a", text)
        talk.now += 1.0
        talk.take()
    assert talk.session._table.alive["a"].ring.num_tokens == 4
    talk.cut()
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    assert [message.code for message in talk.take()] == ["resume_gone"]


def test_what_has_been_confirmed_is_not_kept():
    talk = Talk()
    talk.create("a")
    sizes = []
    for number in range(100):
        talk.says("a", f"{number} ")
        talk.now += 1.0
        talk.take()
        talk.send(t="credit", id="a", max=m.MAX_CREDIT, ack=number)
        sizes.append(talk.session._table.alive["a"].ring.bytes)
    assert max(sizes) < 600


@pytest.mark.parametrize("lost", ["nothing", "end", "all"])
def test_a_finished_stream_comes_again_with_its_last_frame(lost: str):
    talk = Talk()
    talk.create("a")
    talk.says("a", "x y ", {"reason": "stop"})
    first = talk.take(m.Delta, m.Done)
    talk.cut()
    talk.come_back()
    talk.send(t="resume", id="a", from_=0 if lost == "all" else 2)
    resumed, *again = talk.take()
    assert resumed.state == "done"
    assert again == (first if lost == "all" else first[1:])


def test_who_has_read_the_end_may_ask_for_it_again_and_again():
    """Also while the stream is back among those whose end has not been taken, over yet another connection."""
    talk = Talk()
    talk.create("a")
    talk.says("a", "x y ", {"reason": "stop"})
    *_, end = talk.take()
    for _ in range(3):
        talk.cut()
        talk.come_back()
        talk.send(t="resume", id="a", from_=2)  # and nothing is taken
        assert talk.session.num_streams == 1
    resumed, again = talk.take()
    assert (resumed.state, again) == ("done", end)


ANSWERS: dict[str, dict[str, Any]] = {
    "embeddings": {"embedding": struct.pack("<2f", 0.5, -2.0)},
    "score": {"score": Score(-3.0, 3)},
}


@pytest.mark.parametrize("api", ANSWERS)
def test_what_generates_nothing_comes_again_with_its_answer(api: str):
    talk = Talk()
    talk.create("a", api=api, body={"input": "p"})
    talk.session.events([PromptRead(talk.keys["a"], PromptLogprobs(1, (TokenLogprobs(-1.0, ()),)))], talk.now)
    talk.session.events([Finished(talk.keys["a"], "length", 3, 0, 0, TIMINGS, **ANSWERS[api])], talk.now)
    _, *first = talk.take()  # without `accepted`
    assert [type(message) for message in first] == [m.Prompt, m.Done]
    for _ in range(2):
        talk.cut()
        talk.come_back()
        talk.send(t="resume", id="a", from_=0)
        resumed, *again = talk.take()
        assert resumed.state == "done"
        assert again == first
    assert (first[1].embedding is None) == (api == "score")
    assert talk.send(t="fork", from_="a", id="b") == []
    assert talk.take()[0].code == "fork_gone"


@pytest.mark.parametrize("how", ["refused", "cancelled while it waited", "stalled"])
def test_every_other_end_comes_again_too(how: str):
    talk = Talk(streams=1, stall_s=10.0)
    if how == "cancelled while it waited":
        talk.create("first")
    talk.create("a", opened=how == "stalled", max=0)
    if how == "refused":
        talk.session.refused((talk.keys["a"],), OverloadedError("later"), talk.now)
    elif how == "stalled":
        talk.tick(10.0)
    else:
        talk.send(t="cancel", id="a")
    first = [message for message in talk.take(m.Done, m.Error) if message.id == "a"]
    assert len(first) == 1
    talk.cut()
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    resumed, *again = talk.take()
    assert (resumed.id, resumed.state) == ("a", "done")
    assert again == first


def test_what_generates_nothing_needs_no_credit():
    talk = Talk(stall_s=10.0)
    for number, (api, body) in enumerate(
        [
            ("embeddings", {"input": "p"}),
            ("score", {"input": "p"}),
            ("completions", {"prompt": "p", "max_tokens": 0, "echo": True}),
        ]
    ):
        (wish,) = talk.create(f"s{number}", api=api, body=body, max=0)
        assert isinstance(wish, OpenStreams)
        assert wish.credit is None
    talk.tick(100.0)
    assert [message for message in talk.take() if isinstance(message, m.Error)] == []
    assert talk.cancelled() == set()


def test_a_finished_stream_is_kept_from_its_last_frame_on():
    talk = Talk(resume_s=60.0)
    for name in "ab":
        talk.create(name)
    talk.ends("a")
    talk.now += 50.0
    talk.ends("b")
    talk.take()  # both are sent only now
    assert talk.session.next_tick() == talk.now + 60.0
    talk.tick(59.0)
    assert set(talk.session._table.retained) == {"a", "b"}
    talk.tick(1.0)
    assert set(talk.session._table.retained) == set()


def test_a_name_that_lives_again_is_not_kept_for_the_finished_one():
    talk = Talk()
    talk.create("a")
    talk.ends("a")
    talk.take()
    assert set(talk.session._table.retained) == {"a"}
    talk.create("a")
    assert set(talk.session._table.retained) == set()
    assert talk.session._table.kept_bytes == 0


def test_another_epoch_ends_nothing():
    talk = Talk()
    talk.create("a")
    talk.cut()
    talk.come_back()
    assert talk.send(t="resume", id="a", from_=0, epoch="other") == []
    assert talk.take()[0].code == "resume_gone"
    talk.send(t="resume", id="a", from_=0, epoch="e")
    assert isinstance(talk.take()[0], m.Resumed)


def test_an_echo_is_not_read_twice():
    talk = Talk()
    talk.create("a")
    talk.session.events([Delta(talk.keys["a"], 0, 0, "echo", ())], talk.now)
    (echo,) = talk.take(m.Delta)
    assert (echo.o, echo.n, echo.x) == (0, 0, "echo")
    talk.cut()
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    talk.says("a", "x ")
    talk.now += 1.0
    assert [(delta.o, delta.n) for delta in talk.take(m.Delta)] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_log_probabilities_of_the_prompt_come_again_whole(taken: int):
    """Frames of 64 positions: some may be lost with the connection, and others still wait when it breaks."""
    talk = Talk()
    talk.create("a")
    entries = tuple(TokenLogprobs(-float(position), ()) for position in range(1, 101))
    talk.session.events([PromptRead(talk.keys["a"], PromptLogprobs(1, entries))], talk.now)
    said = [talk.session.next_message(talk.now) for _ in range(1 + taken)][1:]
    assert [frame.o for frame in said] == [1, 65][:taken]
    talk.cut()
    talk.come_back()
    talk.send(t="resume", id="a", from_=0)
    frames = talk.take(m.Prompt)
    assert [(frame.o, len(frame.lp)) for frame in frames] == [(1, 64), (65, 36)]


def test_signs_of_life_go_to_the_longest_silent_also_after_a_second_resume():
    talk = Talk(heartbeat_s=20.0)
    talk.create("a", "b")
    talk.take()
    talk.now += 10.0
    talk.send(t="resume", id="a", from_=0)
    talk.take()
    assert talk.session.next_due(talk.now) == pytest.approx(10.0)
    talk.now += 10.0
    assert talk.take() == [m.Status("b", "queued")]


# -- memory -------------------------------------------------------------------------------------------------------


def test_the_oldest_finished_streams_are_forgotten_when_too_much_is_kept():
    talk = Talk(retained=20_000)
    for number in range(50):
        talk.create(f"s{number}")
        talk.says(f"s{number}", "x ", {"reason": "stop"})
        talk.take()
        assert talk.session.retained_bytes <= 20_000
    kept = list(talk.session._table.retained)
    assert kept == [f"s{number}" for number in range(50 - len(kept), 50)]
    assert len(kept) >= 3


def test_long_prompts_count_as_kept():
    """A finished stream keeps its whole request for forks: that is what it weighs."""
    talk = Talk(retained=1_000_000)
    for number in range(30):
        talk.create(f"s{number}", body={"prompt": "x" * 100_000})
        talk.ends(f"s{number}")
        talk.take()
    assert len(talk.session._table.retained) <= 10
    assert sum(len(stream.body[1]["prompt"]) for stream in talk.session._table.retained.values()) <= 1_000_000


@pytest.mark.parametrize(("api", "count"), [("embeddings", 4096), ("score", 2000)])
def test_answers_count_as_kept(api: str, count: int):
    """A long vector, or the log-probabilities of a long prompt, is all that is kept of a stream that generates nothing."""
    talk = Talk(retained=2_000_000)
    entries = tuple(TokenLogprobs(-1.0, tuple((token, -1.0) for token in range(5))) for _ in range(count))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(30):
        talk.create(f"s{number}", api=api, body={"input": "p"})
        if api == "score":
            talk.session.events([PromptRead(talk.keys[f"s{number}"], PromptLogprobs(1, entries))], talk.now)
        embedding = bytes(4 * count) if api == "embeddings" else None
        talk.session.events([Finished(talk.keys[f"s{number}"], "length", 3, 0, 0, TIMINGS, embedding=embedding)], talk.now)
        talk.take()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0 < len(talk.session._table.retained) < 30
    assert held < 1.25 * talk.session.retained_bytes, "more is kept than is counted"


def test_who_cannot_be_forked_does_not_keep_its_request():
    talk = Talk()
    talk.create("a", opened=False, api="embeddings", body={"input": "x" * 1_000_000})
    talk.session.opened(talk.keys["a"], "r", 1_000_000, now=talk.now)
    talk.session.events([Finished(talk.keys["a"], "length", 3, 0, 0, TIMINGS, embedding=bytes(12))], talk.now)
    talk.take()
    assert talk.session._table.retained["a"].body is None
    assert talk.session.retained_bytes < 10_000


# -- forks --------------------------------------------------------------------------------------------------------


def test_an_echo_is_no_text_of_the_parent():
    """A fork looks for text that its parent held back behind what the client has; an echoed prompt is not part of that."""
    talk = Talk()
    talk.create("a")
    talk.session.events([Delta(talk.keys["a"], 0, 0, "the prompt", ())], talk.now)
    talk.take()
    talk.says("a", "one two ")
    talk.take()
    assert talk.fork("a", "b", at=2).fork.chars == len("one two ")
    assert talk.fork("a", "c", at=0).fork.chars == 0
    talk.says("a", "three ")
    assert talk.fork("a", "d").fork.chars == len("one two three ")


def test_a_fork_of_a_fork_counts_the_text_of_both():
    talk = Talk()
    talk.create("a")
    talk.says("a", "one two ")
    talk.take()
    talk.fork("a", "b", at=2)
    assert talk.fork("b", "c").fork.chars == len("one two ")
    talk.says("b", "three ")
    talk.take()
    assert [len(talk.fork("b", name, at=at).fork.output) for name, at in (("x", 2), ("y", 3))] == [0, 1]
    assert talk.fork("b", "d", at=3).fork.chars == len("one two three ")
    assert talk.fork("b", "e", at=2).fork.chars == len("one two ")
    # After a prompt of its own, the text of its parents is not its own any more.
    talk.fork("b", "f", body={"prompt": "more"})
    talk.says("f", "four ")
    assert talk.fork("f", "g").fork.chars == len("four ")


def test_where_no_delta_ends_the_characters_are_not_known_for_the_forks_either():
    talk = Talk()
    talk.create("a")
    talk.says("a", "one two ")
    talk.take()
    talk.fork("a", "b", at=1)
    talk.says("b", "three ")
    assert [talk.fork("a", "c", at=1).fork.chars, talk.fork("b", "d").fork.chars] == [None, None]


@pytest.mark.parametrize("at", [-1, 5, 2**60])
def test_a_fork_from_where_the_parent_has_not_been_is_refused(at: int):
    talk = Talk()
    talk.create("a")
    talk.says("a", "1 2 3 4 ")
    talk.take()
    assert talk.send(t="fork", from_="a", id="b", at=at) == []
    (error,) = talk.take()
    assert (error.id, error.code, error.param) == ("b", "invalid_request", "at")


def test_what_cannot_be_forked_says_so():
    talk = Talk(streams=1)
    talk.create("a", opened=False)
    talk.create("w", opened=False)
    for source in ("a", "w", "nobody"):
        talk.send(t="fork", from_=source, id=f"of-{source}")
    errors = talk.take(m.Error)
    assert [(error.id, error.code) for error in errors] == [(f"of-{source}", "fork_gone") for source in ("a", "w", "nobody")]


def test_a_fork_takes_the_name_of_its_own_finished_parent():
    talk = Talk()
    talk.create("a")
    talk.says("a", "1 2 ", {"reason": "stop"})
    talk.take()
    wish = talk.fork("a", "a")
    assert (wish.keys, wish.fork.output, wish.fork.record) == (("a#1",), (0, 1), "record of a#0")


# -- the queue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["embeddings", "score"])
def test_each_waiting_stream_keeps_its_own_input_when_a_sibling_is_cancelled(api: str):
    talk = Talk(streams=3)
    talk.create("busy", "busy2")
    talk.create("a", "b", "c", api=api, body={"input": ["of a", "of b", "of c"]}, opened=False)
    talk.send(t="cancel", id="a")
    (wish,) = talk.send(t="cancel", id="busy") and talk.ends("busy")
    assert wish.keys == ("b#3", "c#4")
    assert wish.body.inputs == ("of b", "of c")

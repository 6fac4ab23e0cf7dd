"""Random clients against a random engine, on one sans-IO session: every promise of the wire, without a wire.

The client is a model: it knows what it asked for and checks each message that the session gives out. The engine is a model too:
it opens, refuses, feeds and ends what it is told to, in any order. Text may come before `accepted` is out, cancels may cross
ends, and the connection may be lost at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streamkv.errors import ContextLengthError, InvalidRequestError, OverloadedError
from streamkv.protocol import messages as m
from streamkv.protocol.session import Action, CancelStream, Close, OpenStreams, Session, SessionLimits
from streamkv.sampling_params import TokenLogprobs
from streamkv.text.events import Delta, Finished, Status, Timings

LIMITS = SessionLimits(streams=3, queue=3, control=12, flush_tokens=4, flush_bytes=16, heartbeat_s=5.0)
IDS = ["a", "b", "c", "d", "e"]
BAD_PARTS: list[dict[str, Any]] = [
    {"api": "none"},
    {"max": 5},
    {"priority": "x"},
    {"on_disconnect": 5},
    {"body": {}},
    {"body": {"prompt": ""}},
    {"body": 5},
]
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
BAD_CREATES = st.builds(
    lambda stream_id, part: {"t": "create", "id": stream_id, "api": "completions", "body": {"prompt": "p"}} | part,
    st.sampled_from(IDS),
    st.sampled_from(BAD_PARTS),
)
NONSENSE = st.builds(
    lambda kind, fields: {"t": kind} | fields,
    st.sampled_from(["cancel", "ping", "credit", "fork", "status", "x", 5, None]),
    st.dictionaries(
        st.sampled_from(["id", "ids", "max", "ack", "from", "at", "ts", "epoch", "body"]), SCALARS | st.lists(st.text())
    ),
)
RESUMES = st.builds(lambda stream_id: {"t": "resume", "id": stream_id, "epoch": "e", "from": 3}, st.sampled_from(IDS))
MISTAKES = st.binary(max_size=40) | BAD_CREATES | NONSENSE | RESUMES
TIMINGS = Timings(0.1, 0.2, 0.3, 0.4)


def new_session(codec: m.Codec = m.CODECS["streamkv.v1.json"], limits: SessionLimits = LIMITS) -> Session:
    return Session(
        codec,
        limits,
        session_id="s",
        epoch="e",
        server="t",
        models=("fake",),
        max_model_len=100,
    )


@dataclass
class Asked:
    """One life of an id, as the client knows it."""

    accepted: bool = False
    text: str = ""
    count: int = 0


@dataclass
class Running:
    """One life of an id in the engine."""

    ids: tuple[str, ...]
    opened: bool = False
    begun: bool = False
    cancelled: bool = False
    text: str = ""
    count: int = 0
    ended: str | None = None


@dataclass
class Worlds:
    """What both sides know."""

    asked: dict[str, Asked] = field(default_factory=dict)  # lives without their last frame
    refused: list[str] = field(default_factory=list)  # errors to come for ids that never lived
    engine: dict[str, Running] = field(default_factory=dict)
    told: dict[str, Running] = field(default_factory=dict)  # the latest life in the engine, ended or not


class SessionMachine(RuleBasedStateMachine):
    @initialize(codec=st.sampled_from(["json", "msgpack"]))
    def begin(self, codec: str) -> None:
        self.codec = m.CODECS[f"streamkv.v1.{codec}"]
        self.now = 1000.0
        self.connect()

    def connect(self) -> None:
        self.worlds = Worlds()
        self.closed = self.draining = False
        self.session = new_session(self.codec)
        assert self.send({"t": "hello"}) == []
        assert isinstance(self.session.next_message(self.now), m.Welcome)

    # -- the client -----------------------------------------------------------------------------------------------

    def send(self, message: Any) -> list[Action]:
        return self.feed(self.codec.encode(message))

    def feed(self, data: bytes) -> list[Action]:
        running = {stream_id for stream_id, life in self.worlds.engine.items() if life.ended is None}
        actions = self.session.receive(data, is_text=self.codec.text, now=self.now)
        if any(isinstance(action, Close) for action in actions):
            assert {action.id for action in actions if isinstance(action, CancelStream)} == running
            self.gone()
        else:
            self.carry_out(actions)
        return actions

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, OpenStreams):
                for stream_id in action.ids:
                    assert stream_id not in self.worlds.engine, "opened twice"
                    assert stream_id in self.worlds.asked, "opened unasked"
                    self.worlds.engine[stream_id] = self.worlds.told[stream_id] = Running(action.ids)
            elif isinstance(action, CancelStream) and action.id in self.worlds.engine:
                self.worlds.engine[action.id].cancelled = True

    def gone(self) -> None:
        self.closed = True
        self.worlds = Worlds()

    def can_send(self) -> bool:
        """On a new connection if the last one has ended; not while the server does not read."""
        if self.closed:
            while self.take():
                pass
            self.connect()
        return not self.session.crowded

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True), several=st.booleans(), at_once=st.booleans())
    def create(self, ids: list[str], several: bool, at_once: bool) -> None:
        if not self.can_send():
            return
        if not several:
            ids = ids[:1]
        alive = len(self.worlds.asked)
        taken = any(stream_id in self.worlds.asked for stream_id in ids)
        too_many = alive + len(ids) > LIMITS.streams + LIMITS.queue or len(ids) > LIMITS.streams
        if not taken:
            if self.draining or too_many:
                self.worlds.refused += ids
            else:
                self.worlds.asked |= {stream_id: Asked() for stream_id in ids}
        names = {"ids": ids} if several else {"id": ids[0]}
        self.send({"t": "create", "api": "completions", "body": {"prompt": "p", "max_tokens": 50}} | names)
        if at_once:
            for stream_id in ids:
                if stream_id in self.worlds.engine and not self.worlds.engine[stream_id].opened:
                    self.open_group(self.worlds.engine[stream_id].ids)

    @rule(stream_id=st.sampled_from(IDS), rarely=st.integers(0, 3))
    def cancel(self, stream_id: str, rarely: int) -> None:
        if rarely == 3 and self.can_send():
            self.send({"t": "cancel", "id": stream_id})

    @rule(message=MISTAKES)
    def make_a_mistake(self, message: Any) -> None:
        if not self.can_send():
            return
        if isinstance(message, bytes):
            self.feed(message)
            return
        stream_id = message.get("id")
        if message["t"] in ("create", "resume") and stream_id not in self.worlds.asked:
            self.worlds.refused.append(stream_id)
        before = self.session.num_streams
        self.send(message)
        assert self.closed or self.session.num_streams == before or message["t"] == "cancel"

    @rule(how=st.sampled_from(["drain", "lose", "bye", "hello", "opcode"]), rarely=st.integers(0, 7))
    def end(self, how: str, rarely: int) -> None:
        if rarely < 7 or len(self.worlds.asked) < 2 or not self.can_send():
            return
        if how == "drain":
            assert self.session.drain(1000, "test") == []
            self.draining = True
        elif how == "lose":
            self.lose()
        elif how == "opcode":
            running = self.lives()
            actions = self.session.receive(b"", is_text=not self.codec.text, now=self.now)
            assert sorted(action.id for action in actions if isinstance(action, CancelStream)) == sorted(running)
            self.gone()
        else:
            assert isinstance(self.send({"t": how})[-1], Close)
        assert self.closed or how == "drain"

    def lose(self) -> None:
        running, lives = self.lives(), dict(self.worlds.engine)
        assert sorted(action.id for action in self.session.lost()) == sorted(running)
        self.gone()
        # What the engine still says of them reaches nobody and breaks nothing.
        for stream_id, life in lives.items():
            assert self.session.opened(life.ids, "r", 3) == []
            late = [Delta(stream_id, life.count, 1, "late", (1,)), Finished(stream_id, "cancelled", 1, 1, 0, TIMINGS)]
            assert self.session.events(late, self.now) == []
            assert self.session.refused(life.ids, OverloadedError("late")) == []
        assert self.session.num_streams == 0

    # -- the engine -----------------------------------------------------------------------------------------------

    def lives(self, *, opened: bool | None = None) -> list[str]:
        return [
            stream_id
            for stream_id, life in self.worlds.engine.items()
            if life.ended is None and (opened is None or life.opened is opened)
        ]

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        unopened = [stream_id for stream_id, life in self.worlds.engine.items() if not life.opened]
        if not unopened:
            return
        self.open_group(self.worlds.engine[data.draw(st.sampled_from(unopened))].ids)

    def open_group(self, group: tuple[str, ...]) -> None:
        for stream_id in group:
            self.worlds.engine[stream_id].opened = True
        self.carry_out(self.session.opened(group, "r", 3))
        self.forget()

    @rule(data=st.data(), error=st.sampled_from([OverloadedError("x"), ContextLengthError("y", param="prompt")]))
    def refuse(self, data: st.DataObject, error: InvalidRequestError) -> None:
        if not self.lives(opened=False):
            return
        group = self.worlds.engine[data.draw(st.sampled_from(self.lives(opened=False)))].ids
        if any(self.worlds.engine[stream_id].begun for stream_id in group):
            return
        for stream_id in group:
            self.worlds.engine[stream_id].ended = error.code
            self.worlds.engine[stream_id].opened = True
        actions = self.session.refused(group, error)
        self.forget()
        self.carry_out(actions)

    @rule(data=st.data())
    def step_and_write(self, data: st.DataObject) -> None:
        self.step(data)
        self.write(100, busy=False, seconds=0.0)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        events: list[Any] = []
        if not self.lives():
            return
        for stream_id in data.draw(st.lists(st.sampled_from(self.lives()), min_size=1, max_size=4, unique=True)):
            self.worlds.engine[stream_id].begun = True
            events += self.produce(data, stream_id, self.worlds.engine[stream_id])
        for stream_id, life in self.worlds.told.items():
            if life.ended is not None:  # nothing follows a last event, whatever an engine does
                events += [Delta(stream_id, life.count, 1, "late", (1,)), Finished(stream_id, "stop", 1, 1, 0, TIMINGS)]
        actions = self.session.events(events, self.now)
        self.forget()
        self.carry_out(actions)

    def produce(self, data: st.DataObject, stream_id: str, life: Running) -> list[Any]:
        events: list[Any] = []
        kinds = st.sampled_from(["text", "logprobs", "text", "prefill", "decode", "text", "preempted", "end"])
        for kind in data.draw(st.lists(kinds, min_size=1, max_size=3)):
            if kind in ("text", "logprobs"):
                count = data.draw(st.integers(0, 5))
                piece = data.draw(st.text(max_size=6)) or ("x" if not count else "")
                logprobs = (TokenLogprobs(-0.5, ((1, -0.5),)),) * count if kind == "logprobs" else None
                events.append(Delta(stream_id, life.count, count, piece, (1,) * count, logprobs))
                life.count += count
                life.text += piece
            elif kind != "end":
                events.append(Status(stream_id, kind, 4 if kind == "prefill" else None))
            else:
                self.finish(stream_id, life, events, data.draw(st.sampled_from(["stop", "length", "error"])))
                break
        return events

    def finish(self, stream_id: str, life: Running, events: list[Any], reason: str) -> None:
        life.ended = "cancelled" if life.cancelled else reason
        error = ("internal", "broken") if life.ended == "error" else None
        events.append(Finished(stream_id, life.ended, 3, life.count, 0, TIMINGS, error))

    def forget(self) -> None:
        self.worlds.engine = {
            stream_id: life for stream_id, life in self.worlds.engine.items() if life.ended is None or not life.opened
        }

    # -- the writer -----------------------------------------------------------------------------------------------

    @rule(count=st.sampled_from([1, 2, 5, 100]), busy=st.booleans(), seconds=st.sampled_from([0.0, 0.03, 0.06, 6.0]))
    def write(self, count: int, busy: bool, seconds: float) -> None:
        self.now += seconds
        for _ in range(count):
            if not self.take(busy=busy):
                break

    def take(self, *, busy: bool = False) -> bool:
        due = self.session.next_due(self.now, busy=busy)
        message = self.session.next_message(self.now, busy=busy)
        if message is None:
            assert due is None or due > 0, "says that something is due and has nothing: the writer would spin"
            return False
        assert due == 0, "has a message and does not say so: the writer would sleep"
        again = self.codec.decode_server(self.codec.encode(message))
        assert type(again) is type(message)
        self.check(message)
        return True

    def check(self, message: m.ServerMessage) -> None:
        asked = self.worlds.asked
        stream_id = getattr(message, "id", None)
        match message:
            case m.Pong() | m.Drain():
                pass
            case m.Error(id=None):
                assert message.code in ("invalid_request", "unknown_type", "stream_exists", "resume_gone")
            case _ if self.closed:
                assert isinstance(message, (m.Error, m.Accepted)), f"{message} after the end"
            case m.Error() if stream_id in self.worlds.refused:
                self.worlds.refused.remove(stream_id)
            case m.Accepted():
                assert not asked[stream_id].accepted
                asked[stream_id].accepted = True
            case m.Status(state="queued"):
                assert stream_id in asked
            case m.Status():
                assert asked[stream_id].accepted
            case m.Delta():
                life = asked[stream_id]
                assert life.accepted
                assert message.o == life.count
                assert message.lp is None or len(message.lp) <= message.n
                life.text += message.x
                life.count += message.n
            case m.Done() | m.Error():
                life = asked.pop(stream_id)
                told = self.worlds.told.pop(stream_id, None)
                if told is None:
                    assert (message.finish_reason, life.accepted) == ("cancelled", False), "ended without having run"
                else:
                    assert (life.text, life.count) == (told.text, told.count), "not the text that the engine produced"
                    reason = message.finish_reason if isinstance(message, m.Done) else None
                    assert reason == (told.ended if isinstance(message, m.Done) else None)
                    if isinstance(message, m.Done):
                        assert message.o == life.count
            case _:
                raise AssertionError(f"unexpected {message}")

    # -- always ---------------------------------------------------------------------------------------------------

    @invariant()
    def bounded(self) -> None:
        session = self.session
        assert session.num_streams <= LIMITS.streams + LIMITS.queue
        assert len(session._running) <= LIMITS.streams
        assert len(session._outbox._control) <= LIMITS.control + 4 + LIMITS.streams
        assert session._outbox.bytes == sum(stream.weight for stream in session._streams.values())
        if not self.closed:
            assert set(session._streams) == set(self.worlds.asked)
            assert not session._waiting or len(session._running) + len(session._waiting[0].ids) > LIMITS.streams, "idle places"

    def teardown(self) -> None:
        """Let everything come to its end: each stream must have exactly one last frame."""
        while self.lives() or any(not life.opened for life in self.worlds.engine.values()):
            while unopened := [name for name, life in self.worlds.engine.items() if not life.opened]:
                self.open_group(self.worlds.engine[unopened[0]].ids)
            events: list[Any] = []
            for stream_id in self.lives():
                self.finish(stream_id, self.worlds.engine[stream_id], events, "stop")
            self.forget()
            self.carry_out(self.session.events(events, self.now))
        while self.take():
            pass
        assert self.worlds.asked == {}, "streams without a last frame"
        assert self.closed or self.worlds.refused == [], "refused without an error"
        assert self.closed or self.session.num_streams == 0
        assert self.session.next_due(self.now) is None


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(settings.default, max_examples=250, stateful_step_count=80)

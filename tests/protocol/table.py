"""A table at which a client and an engine sit, with one session between them: what both know, and what each checks."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from streamkv.errors import OverloadedError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, Close, GrantCredit, OpenStreams
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outstream import OutStream
from streamkv.protocol.session import Session
from streamkv.text.events import Delta, Finished
from tests.protocol.world import TIMINGS, VECTOR, Engine, Kept, Life, Run

LIMITS = SessionLimits(
    streams=3,
    queue=3,
    control=12,
    flush_tokens=4,
    flush_bytes=16,
    heartbeat_s=5.0,
    ring=12,
    retained=4 * 5000,
    grace_s=15.0,
    resume_s=40.0,
    stall_s=25.0,
)
IDS = ["a", "b", "c", "d", "e"]


def new_session(codec: m.Codec = m.CODECS["streamkv.v1.json"], limits: SessionLimits = LIMITS, now: float = 0.0) -> Session:
    return Session(
        codec,
        limits,
        session_id="s",
        epoch="e",
        server="t",
        models=("fake",),
        max_model_len=100_000,
        now=now,
    )


class Table(RuleBasedStateMachine):
    """Writing and reading; the rules of `test_session.py` do the rest."""

    @initialize(codec=st.sampled_from(["json", "msgpack"]))
    def begin(self, codec: str) -> None:
        self.now = 1000.0
        self.codec = m.CODECS[f"streamkv.v1.{codec}"]
        self.start_afresh()

    def start_afresh(self) -> None:
        self.session = new_session(self.codec, now=self.now)
        self.engine = Engine()
        self.lives: dict[str, Life] = {}  # of each id the latest, until its client has its last frame
        self.over: dict[str, Life] = {}  # whose last frame it has, for what comes again
        self.by_key: dict[str, Life] = {}
        # Errors to come, for ids that never lived, or have been forgotten; True = to a `resume`.
        self.refusals: list[tuple[str, Life | None, bool]] = []
        self.wire: deque[m.ServerMessage] = deque()
        self.draining = False
        self.expect_welcome(resumed=False)

    def expect_welcome(self, *, resumed: bool) -> None:
        assert self.session.next_due(self.now) == 0.0
        welcome = self.session.next_message(self.now)
        assert isinstance(welcome, m.Welcome)
        assert (welcome.resumed, welcome.session, welcome.grace_s) == (resumed, "s", 15.0)

    # -- connections ----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.session.attached

    def can_send(self) -> bool:
        """Not while the server does not read; over a new connection if the last one is gone."""
        if not self.connected:
            self.connect()
        return not self.session.crowded

    def connect(self) -> None:
        if self.session.closed:
            self.start_afresh()
            return
        self.session.attach(self.codec, self.now)
        self.draining = False
        self.expect_welcome(resumed=True)

    def end_session(self, actions: list[Action]) -> None:
        """It forgets everything; what still comes from the engine reaches nobody and breaks nothing."""
        assert self.session.closed
        self.carry_out([action for action in actions if not isinstance(action, Close)])
        self.lives.clear()
        self.wire.clear()
        self.check_closed()

    def check_closed(self) -> None:
        session = self.session
        for run in self.engine.runs.values():
            assert run.cancelled or run.ended is not None or not run.opened, f"{run} runs on for nobody"
            if not run.opened:
                assert session.opened(run.key, "r", 3, run.record, now=self.now) == [CancelStream(run.key)]
            late = [Delta(run.key, run.made, 1, "late", (1,)), Finished(run.key, "cancelled", 1, 1, 0, TIMINGS)]
            assert session.events(late, self.now) == []
            assert session.refused((run.key,), OverloadedError("late"), self.now) == []
            assert not session.wants((run.key,))
        self.engine.runs.clear()
        self.engine.saying.clear()
        assert (session.num_streams, session.retained_bytes, session.next_tick()) == (0, 0, math.inf)
        assert session.receive(b"{}", is_text=True, now=self.now) == []

    # -- what the client knows ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Action]:
        return self.session.receive(data, is_text=self.codec.text, now=self.now)

    def send(self, message: dict[str, Any]) -> list[Action]:
        actions = self.receive(self.codec.encode(message))
        self.carry_out(actions)
        return actions

    def alive(self, life: Life | None) -> OutStream | None:
        """The session's own record of it, looked at to know what should follow."""
        stream = None if life is None else self.session._table.find(life.id)
        return stream if stream is not None and life is not None and stream.key == life.key else None

    def runs(self, life: Life) -> bool:
        """The engine works for it, as far as its session knows."""
        return life.key in self.session._table.running

    def new_lives(self, ids: list[str], credit: int | None, keeps: bool, base: int = 0, wanted: str = "text") -> None:
        credit = None if credit == m.MAX_CREDIT or wanted != "text" else credit
        for number, stream_id in enumerate(ids, self.session._table._next_key):
            life = Life(stream_id, base, credit, keeps, Kept(LIMITS.ring, base), key=f"{stream_id}#{number}", wanted=wanted)
            life.since = self.now
            self.lives[stream_id] = self.by_key[life.key] = life
            self.over.pop(stream_id, None)

    def may_be_made(self, ids: list[str]) -> bool:
        """False if the session must refuse; then the errors are expected."""
        if any(stream_id in self.session._table.alive for stream_id in ids):
            return False  # a notice without an id
        self.catch_up(ids)
        too_many = self.session.num_streams + len(ids) > LIMITS.streams + LIMITS.queue or len(ids) > LIMITS.streams
        if self.draining or too_many:
            self.expect_refusals(ids)
            return False
        return True

    def catch_up(self, ids: list[str]) -> None:
        """A name is used again by a client that knows that it is free."""
        if any(getattr(message, "id", None) in ids for message in self.wire):
            self.write(1000, busy=False, seconds=0.0)
            self.deliver(1000)

    def expect_refusals(self, ids: list[str]) -> None:
        self.refusals += [(stream_id, None, False) for stream_id in ids]

    # -- the engine -----------------------------------------------------------------------------------------------

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, OpenStreams):
                assert self.session.wants(action.keys), "opens what it does not want"
                first = self.by_key[action.keys[0]]
                self.engine.carry_out(action, first.base, first.wanted)
            elif not isinstance(action, Close):
                self.engine.carry_out(action)

    def unended(self, *, opened: bool | None = None) -> list[Run]:
        return [run for run in self.engine.runs.values() if run.ended is None and (opened is None or run.opened is opened)]

    def open_group(self, group: tuple[str, ...]) -> None:
        for key in group:
            run = self.engine.run(key)
            run.opened = True
            actions = self.session.opened(key, "r", 3, run.record, now=self.now)
            assert all(isinstance(action, (CancelStream, GrantCredit)) for action in actions)
            if run.ended is None:
                self.carry_out(actions)
                stream = self.session._table.in_engine.get(key)
                assert run.cancelled == (stream is None or stream.state.value == "cancelling" or stream.end is not None)
            self.engine.answered(run)

    # -- the writer and the wire ----------------------------------------------------------------------------------

    @rule(count=st.sampled_from([1, 2, 5, 100]), busy=st.booleans(), seconds=st.sampled_from([0.0, 0.03, 0.06, 6.0]))
    def write(self, count: int, busy: bool, seconds: float) -> None:
        self.now += seconds
        for _ in range(count):
            if not self.take(busy=busy):
                break

    def take(self, *, busy: bool = False) -> bool:
        due = self.session.next_due(self.now, busy=busy)
        alive = dict(self.session._table.alive)
        retained = list(self.session._table.retained)
        message = self.session.next_message(self.now, busy=busy)
        if message is None:
            assert due is None or due > 0, "says that something is due and has nothing: the writer would spin"
            return False
        assert due == 0, "has a message and does not say so: the writer would sleep"
        again = self.codec.decode_server(self.codec.encode(message))
        assert type(again) is type(message)
        self.note(message, alive, retained)
        self.wire.append(message)
        return True

    def note(self, message: m.ServerMessage, alive: dict[str, OutStream], retained: list[str]) -> None:
        """What the session has let go of with this message."""
        stream_id = getattr(message, "id", None)
        life = self.lives.get(stream_id) or self.over.get(stream_id)
        if isinstance(message, m.Delta) and life is not None:
            chars = [chars for chunk, _, chars in alive[life.id].ring._chunks if chunk is message]
            life.kept.sent(message, chars[0] if chars else -1)
        stream = alive.get(stream_id)
        if life is None or stream is None or stream.end is not message:
            return
        table = self.session._table
        for stream_id in retained:
            if stream_id in self.lives and table.find(stream_id) is None:
                self.lives[stream_id].excuse = "too much memory"
        if table.find(life.id) is None:
            assert not life.keeps or stream.kept > LIMITS.retained, f"the end of {life} is not kept"
            life.excuse = "not kept"  # impatient, or larger than all that may be kept: its last frame goes once
        elif life.id in table.retained:
            life.since = self.now

    @rule(count=st.sampled_from([1, 3, 100]))
    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            self.read(self.wire.popleft())

    def read(self, message: m.ServerMessage) -> None:
        stream_id = getattr(message, "id", None)
        life = self.lives.get(stream_id) or self.over.get(stream_id)
        match message:
            case m.Pong() | m.Drain():
                pass
            case _ if self.session.closed:
                assert isinstance(message, (m.Error, m.Accepted, m.Resumed)), f"{message} after the end"
            case m.Error(id=None):
                assert message.code in ("invalid_request", "unknown_type", "stream_exists", "resume_gone")
            case m.Error() if (refusal := self.refusal(message)) is not None:
                self.refusals.remove(refusal)
                if refusal[1] is not None and life is refusal[1]:
                    self.lives.pop(stream_id, None)
            case m.Error() if stream_id not in IDS:
                assert message.code in ("invalid_request", "fork_gone", "resume_gone", "draining", "too_many_streams")
            case m.Resumed():
                assert life is not None
                life.away, life.resumed = False, True
            case m.Accepted():
                assert life is not None
                assert not life.accepted
                life.accepted = True
            case _:
                assert life is not None, f"{message} for nobody"
                assert not life.away, f"{message} for a stream that has not been resumed"
                self.read_stream(life, message)

    def refusal(self, error: m.Error) -> tuple[str, Life | None, bool] | None:
        """What the error answers, if it is not the end of a stream."""
        wanted = (error.id, error.code == "resume_gone")
        return next((refusal for refusal in self.refusals if (refusal[0], refusal[2]) == wanted), None)

    def read_stream(self, life: Life, message: Any) -> None:
        match message:
            case m.Status():
                assert life.accepted or life.resumed or message.state == "queued"
            case m.Prompt():
                assert life.accepted or life.resumed
                assert message.o <= 1 + life.prompt, "a part of the prompt is missing"
                assert message.o == 1 + life.prompt or life.replaying
                life.prompt = max(life.prompt, message.o - 1 + len(message.lp))
            case m.Delta():
                assert life.accepted or life.resumed
                life.read(message)
            case m.Done() | m.Error():
                self.check_end(life, message)
                self.over[life.id] = life
                self.lives.pop(life.id, None)
            case _:
                raise AssertionError(f"unexpected {message}")

    def check_end(self, life: Life, message: m.Done | m.Error) -> None:
        if life.key not in self.engine.runs and life.key not in self.engine.past:
            assert message.finish_reason == "cancelled", "ended without having run"
            assert (message.o, life.text, life.accepted) == (life.base, "", False) or life.replaying
            return
        run = self.engine.run(life.key or "")
        assert life.text == run.text, "not the text that the engine produced"
        assert life.count == life.base + len(run.tokens)
        assert life.prompt == run.prompt or run.ended in ("cancelled", "stalled")
        if isinstance(message, m.Done):
            assert (message.o, message.finish_reason) == (life.count, run.ended)
            answered = run.ended != "cancelled"
            assert message.embedding == (VECTOR if answered and run.wanted == "embedding" else None)
            assert (message.score is not None) == (answered and run.wanted == "score")
        else:
            assert message.code in (run.ended, "internal", "stalled_timeout")

"""Random clients against a random engine, on one sans-IO session: every promise of the wire, without a wire.

The client is a model: it knows what it asked for and checks each message that it reads. The engine is a model too: it opens,
refuses, feeds and ends what it is told to, in any order, and what it says takes its time. Between session and client is a wire
that may be cut anywhere: what the writer has put into it is then lost from some frame on. The client comes back, or does not,
and goes on where it is, or asks for what nobody can give.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from streamkv.errors import ContextLengthError, OverloadedError, StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import CancelStream, Close, GrantCredit, OpenStreams
from streamkv.text.events import Finished
from tests.protocol.table import IDS, LIMITS, Table
from tests.protocol.world import BODIES, check_fork

CREDITS = st.none() | st.sampled_from([0, 1, 3, 6, 20, m.MAX_CREDIT])
NAMES = st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True)
BAD_PARTS: list[dict[str, Any]] = [
    {"api": "none"},
    {"max": -1},
    {"priority": "x"},
    {"on_disconnect": 5},
    {"body": {}},
    {"body": {"prompt": ""}},
    {"body": 5},
]
BAD_FORK_PARTS: list[dict[str, Any]] = [{"from": 5}, {"at": "x"}, {"max": -1}, {"priority": "x"}, {"on_disconnect": 5}]
WORDS = st.text(max_size=5).filter(lambda word: word not in IDS)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | WORDS
BAD_CREATES = st.builds(
    lambda stream_id, part: {"t": "create", "id": stream_id, "api": "completions", "body": {"prompt": "p"}} | part,
    st.sampled_from(IDS),
    st.sampled_from(BAD_PARTS),
)
BAD_FORKS = st.builds(
    lambda source, stream_id, part: {"t": "fork", "from": source, "ids": [stream_id]} | part,
    st.sampled_from(IDS),
    st.sampled_from(IDS),
    st.sampled_from(BAD_FORK_PARTS),
)
NONSENSE = st.builds(
    lambda kind, fields: {"t": kind} | fields,
    st.sampled_from(["cancel", "ping", "credit", "fork", "resume", "status", "x", 5, None]),
    st.dictionaries(st.sampled_from(["id", "ids", "max", "ack", "from", "at", "ts", "epoch", "body"]), SCALARS | st.lists(WORDS)),
)
MISTAKES = st.binary(max_size=40) | BAD_CREATES | BAD_FORKS | NONSENSE


class SessionMachine(Table):
    # -- connections ----------------------------------------------------------------------------------------------

    @rule(codec=st.sampled_from(["json", "msgpack"]))
    def reconnect(self, codec: str) -> None:
        if not self.connected:
            self.codec = m.CODECS[f"streamkv.v1.{codec}"]
            self.connect()

    @rule(data=st.data(), how=st.sampled_from(["cut", "cut", "bye", "cut", "close"]), rarely=st.integers(0, 2))
    def disconnect(self, data: st.DataObject, how: str, rarely: int) -> None:
        if (rarely and how != "cut") or not self.connected or not self.lives or (how != "cut" and self.session.crowded):
            return
        self.write(data.draw(st.integers(0, 20)), busy=False, seconds=0.1)
        for _ in range(data.draw(st.integers(0, len(self.wire)))):
            self.read(self.wire.popleft())
        self.refusals.clear()
        impatient = {life.key for life in self.lives.values() if not life.keeps and self.runs(life)}
        if how == "close":
            self.end_session(self.session.close())
            return
        if how == "bye":
            *actions, close = self.receive(self.codec.encode({"t": "bye", "cancel": False}))
            assert close == Close(1000, "bye")
        else:
            actions = self.session.detach(self.now)
        assert {action.key for action in actions if isinstance(action, CancelStream)} == impatient
        self.carry_out(actions)
        self.wire.clear()
        for life in self.lives.values():
            if not life.away and life.id not in self.session._table.retained:
                life.since = self.now
            life.away, life.replaying = True, False
            if not life.keeps:
                life.excuse = "on_disconnect"
        assert self.session.next_due(self.now) is None
        assert self.session.next_message(self.now) is None
        if self.session.closed:
            self.check_closed()

    @rule(how=st.sampled_from(["drain", "hello", "opcode", "utf8", "bye"]), rarely=st.integers(0, 15))
    def end(self, how: str, rarely: int) -> None:
        if rarely or len(self.lives) < 2 or not self.can_send():
            return
        if how == "drain":
            self.session.drain(1000, "test")
            self.draining = True
        elif how in ("opcode", "utf8"):
            wrong_kind = how == "opcode" or not self.codec.text
            *actions, close = self.session.receive(b'{"t":"\xff"}', is_text=self.codec.text != wrong_kind, now=self.now)
            assert close.code == (1003 if wrong_kind else 1007)
            self.end_session(actions)
        else:
            actions = self.receive(self.codec.encode({"t": how}))
            assert isinstance(actions[-1], Close)
            self.end_session(actions)

    # -- the client -----------------------------------------------------------------------------------------------

    @rule(
        ids=NAMES,
        several=st.booleans(),
        at_once=st.booleans(),
        credit=CREDITS,
        keeps=st.integers(0, 4),
        wanted=st.sampled_from(["text", "text", "text", "prompt", "embedding", "score"]),
    )
    def create(self, ids: list[str], several: bool, at_once: bool, credit: int | None, keeps: int, wanted: str = "text") -> None:
        if not self.can_send():
            return
        ids = ids if several else ids[:1]
        if self.may_be_made(ids):
            self.new_lives(ids, credit, bool(keeps), wanted=wanted)
        names = {"ids": ids} if several else {"id": ids[0]}
        more = {} if credit is None else {"max": credit}
        on_disconnect = "grace" if keeps else "cancel"
        actions = self.send({"t": "create", "on_disconnect": on_disconnect} | BODIES[wanted](len(ids)) | names | more)
        if at_once:
            for action in actions:
                if isinstance(action, OpenStreams):
                    self.open_group(action.keys)

    @rule(
        source=st.sampled_from(IDS),
        ids=NAMES,
        at=st.none() | st.integers(-1, 30),
        room=st.none() | st.integers(-1, 8),
        true=st.booleans(),
    )
    def fork(self, source: str, ids: list[str], at: int | None, room: int | None, true: bool) -> None:
        if not self.can_send():
            return
        parent = self.lives.get(source)
        if at is not None and parent is not None and true:
            at = parent.count
        credit = None if room is None else max(0, (at or 0) + room)
        message = {"t": "fork", "from": source, "ids": ids} | ({} if at is None else {"at": at})
        if credit is not None:
            message["max"] = credit
        made = False
        if self.may_be_made(ids):
            stream = self.session._table.find(source)
            known = stream is not None and stream.record is not None
            where = stream.num_tokens if stream is not None and at is None else at
            fits = known and stream.base <= where <= stream.num_tokens and (credit is None or credit >= where)
            made = known and fits and self.by_key[stream.key].wanted == "text"
            if made:
                family, run = self.by_key[stream.key], self.engine.run(stream.key)
                self.new_lives(ids, credit, True, where, family.wanted)
            else:
                self.expect_refusals(ids)
        before = self.session._table._next_key
        actions = self.receive(self.codec.encode(message))
        assert self.session._table._next_key - before == (len(ids) if made else 0)
        if made:
            (fork,) = {
                id(wish.fork): wish.fork for wish in (*actions, *self.session._table.waiting) if self.is_ours(wish, ids)
            }.values()
            check_fork(fork, family, run, where)
            for stream_id in ids:
                self.lives[stream_id].chars = fork.chars
        self.carry_out(actions)

    def is_ours(self, wish: Any, ids: list[str]) -> bool:
        return isinstance(wish, OpenStreams) and wish.keys == tuple(self.lives[stream_id].key for stream_id in ids)

    @rule(stream_id=st.sampled_from(IDS), more=st.integers(-4, 12), ack=st.integers(0, 12), unlimited=st.integers(0, 9))
    def grant(self, stream_id: str, more: int, ack: int, unlimited: int) -> None:
        if not self.can_send():
            return
        life = self.lives.get(stream_id) or self.over.get(stream_id)
        stream = self.alive(life)
        credit = m.MAX_CREDIT if not unlimited else max(0, more + (life.credit or 0 if life is not None else 0))
        ack = max(0, life.count - ack) if life is not None else ack
        if stream is not None and life is not None:
            if life.credit is not None:
                life.credit = max(life.credit, credit)
            life.kept.confirmed(min(ack, life.count))
        actions = self.send({"t": "credit", "id": stream_id, "max": credit, "ack": ack})
        assert all(isinstance(action, GrantCredit) for action in actions)
        assert len(actions) <= 1

    @rule(stream_id=st.sampled_from(IDS), rarely=st.integers(0, 4))
    def cancel(self, stream_id: str, rarely: int) -> None:
        if not rarely and self.can_send():
            self.send({"t": "cancel", "id": stream_id})

    @rule(often=st.integers(0, 3))
    def resume_all(self, often: int) -> None:
        """As a client does."""
        for stream_id, life in list(self.lives.items()) if often else []:
            if life.away and self.can_send():
                self.resume(None, stream_id, "true")  # type: ignore[arg-type]  # draws nothing

    @rule(data=st.data(), stream_id=st.sampled_from(IDS), how=st.sampled_from(["true", "true", "true", "stale", "any", "epoch"]))
    def resume(self, data: st.DataObject, stream_id: str, how: str) -> None:
        if not self.can_send():
            return
        life = self.lives.get(stream_id)
        stream = self.session._table.find(stream_id)
        if life is None and stream is not None:
            # Once more, although its client has read the end.
            life = self.by_key[stream.key]
        offset = life.count if life is not None else 0
        if how == "stale" and life is not None:
            offset = data.draw(st.sampled_from(sorted(life.kept.borders)))
        elif how == "any":
            offset = data.draw(st.integers(-3, offset + 20))
        message = {"t": "resume", "id": stream_id, "from": offset, "epoch": "e" if how != "epoch" else "other"}
        attached = stream is not None and stream.attached
        known = life is not None and self.alive(life) is not None
        if known and life.count < offset <= stream.num_tokens:
            return  # who claims to have what it has not, loses it
        granted = known and how != "epoch" and life.kept.has(offset)
        if how == "true" and life is not None and not known:
            assert life.excuse, f"{life} has been forgotten for no reason"
        if not granted and not attached:
            if known and how != "epoch":
                life.excuse = "resumed where that cannot be"
            self.refusals.append((stream_id, life if life is not None and life.excuse else None, True))
        if granted:
            self.lives[stream_id] = life
            life.kept.confirmed(offset)
            if not attached:
                life.since = self.now
            life.replaying = True
        before = self.session.num_streams
        self.send(message)
        if granted:
            assert self.session._table.alive[stream_id].attached
        elif attached or how == "epoch":
            assert self.session.num_streams == before, "a wrong resume has ended a stream that is well"

    @rule(message=MISTAKES)
    def make_a_mistake(self, message: Any) -> None:
        if not self.can_send():
            return
        if isinstance(message, bytes):
            # Text that is no UTF-8 ends a session: see `end`.
            actions = self.receive(message.decode("latin-1").encode() if self.codec.text else message)
            if self.session.closed:
                self.end_session(actions)
            return
        names = [message["id"]] if message["t"] == "create" else message.get("ids") if message["t"] == "fork" else None
        if isinstance(names, list) and names and names[0] in IDS and names[0] not in self.session._table.alive:
            self.catch_up(names)
            self.expect_refusals(names)
        before = self.session.num_streams
        actions = self.receive(self.codec.encode(message))
        if self.session.closed:
            self.end_session(actions)
        else:
            self.carry_out(actions)
            assert self.session.num_streams == before

    # -- the engine -----------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        unopened = [run for run in self.engine.runs.values() if not run.opened]
        if unopened:
            self.open_group(data.draw(st.sampled_from(unopened)).group)

    @rule(data=st.data(), error=st.sampled_from([OverloadedError("x"), ContextLengthError("y", param="prompt")]))
    def refuse(self, data: st.DataObject, error: StreamKVError) -> None:
        groups = [run.group for run in self.unended(opened=False) if not any(self.engine.run(key).begun for key in run.group)]
        if not groups:
            return
        group = data.draw(st.sampled_from(groups))
        for key in group:
            run = self.engine.runs[key]
            run.opened, run.ended = True, error.code
            self.engine.answered(run)
            self.by_key[key].since = self.now
        self.carry_out(self.session.refused(group, error, self.now))

    @rule(data=st.data())
    def step_and_write(self, data: st.DataObject) -> None:
        self.step(data)
        self.hear(100)
        self.write(100, busy=False, seconds=0.0)
        self.deliver(100)

    @rule(data=st.data(), count=st.integers(0, 10))
    def step_and_half(self, data: st.DataObject, count: int) -> None:
        """The writer has sent some of it, the client has read none."""
        self.step(data)
        self.hear(100)
        self.write(count, busy=False, seconds=0.1)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        free = [run for run in self.unended() if not run.parked or run.cancelled]
        if not free:
            self.create(["a", "b"], several=True, at_once=True, credit=None, keeps=1)
            return
        kinds = st.sampled_from(["text", "logprobs", "text", "prefill", "prompt", "decode", "text", "preempted"])
        for run in data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=4, unique_by=id)):
            said = data.draw(st.lists(st.tuples(kinds, st.integers(0, 6), st.booleans()), min_size=1, max_size=3))
            self.engine.produce(run, said)
            if data.draw(st.integers(0, 5)) == 0 or run.cancelled:
                self.engine.finish(
                    run, data.draw(st.sampled_from(["stop", "length", "error"])), data.draw(st.sampled_from(["", "tail"]))
                )

    @rule(count=st.integers(1, 100))
    def hear(self, count: int) -> None:
        """What the engine has said reaches the session, one step after the other."""
        for _ in range(count):
            if not self.engine.saying:
                return
            run, events = self.engine.saying.pop(0)
            stream = self.session._table.in_engine.get(run.key)
            wanted = stream is not None and stream.end is None
            life = self.by_key[run.key]
            if wanted and run.ended is not None and isinstance(events[-1], Finished):
                life.since = self.now
            self.engine.heard(run, events, still_wanted=wanted)
            actions = self.session.events(events, self.now)
            if wanted and self.alive(life) is None:
                assert not stream.attached, "an attached stream is not given up for its length"
                assert run.base + len(run.tokens) - life.kept.start > LIMITS.ring
                life.excuse = "nobody came for its tokens"
            self.carry_out(actions)
            if run.opened:
                self.engine.answered(run)

    # -- time -----------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 4.0, 9.0, 14.0, 26.0, 41.0]), late=st.booleans())
    def wait(self, seconds: float, late: bool) -> None:
        """The shell ticks when it is due, or when it likes."""
        self.now += seconds
        if late and self.session.next_tick() > self.now:
            return
        before = {stream.key: stream for stream in (*self.session._table.alive.values(), *self.session._table.retained.values())}
        ends = {key: stream.end for key, stream in before.items()}
        actions = self.session.tick(self.now)
        assert self.session.next_tick() > self.now, "the shell would tick again at once"
        known = {stream.key for stream in (*self.session._table.alive.values(), *self.session._table.retained.values())}
        for key, stream in before.items():
            life = self.by_key[key]
            age = self.now - life.since
            if key not in known:
                assert not stream.attached
                assert age > (LIMITS.resume_s if stream.end is not None else LIMITS.grace_s) - 1e-6, (
                    f"{life} forgotten after {age}"
                )
                life.excuse = "too late"
            elif ends[key] is None and stream.end is not None:
                run = self.engine.run(key)
                assert stream.end.code == "stalled_timeout"
                assert run.parked, f"{run} was not without credit"
            elif not stream.attached:
                limit = LIMITS.resume_s if stream.end is not None else LIMITS.grace_s
                assert self.now < stream.since + limit, "kept for too long"
        self.carry_out(actions)
        if self.session.closed:
            self.check_closed()

    @rule(rarely=st.integers(0, 4))
    def shrink(self, rarely: int) -> None:
        oldest = next(iter(self.session._table.retained.values()), None)
        if rarely:
            return
        before = self.session.retained_bytes
        freed = self.session.shrink()
        assert before - self.session.retained_bytes == freed
        assert (freed > 0) == (oldest is not None)
        if oldest is not None:
            self.by_key[oldest.key].excuse = "too much memory"

    # -- always ---------------------------------------------------------------------------------------------------

    @invariant()
    def bounded(self) -> None:
        table, outbox = self.session._table, self.session._outbox
        streams, retained = table.alive, table.retained
        assert not streams.keys() & retained.keys()
        assert len(streams) <= LIMITS.streams + LIMITS.queue
        assert len(table.running) <= LIMITS.streams
        assert len(outbox._control) <= LIMITS.control + 4 + LIMITS.streams
        attached = {stream_id: stream for stream_id, stream in streams.items() if stream.attached}
        assert dict(outbox.streams) == attached
        assert outbox.bytes == sum(stream.weight for stream in attached.values())
        assert not any(stream.attached for stream in retained.values())
        assert table.kept_bytes == sum(stream.kept for stream in retained.values()) <= LIMITS.retained
        assert all(stream.kept >= stream.bytes for stream in retained.values())
        assert attached == {} or self.connected
        assert not table.waiting or len(table.running) + len(table.waiting[0].keys) > LIMITS.streams, "idle places"
        for stream in (*streams.values(), *retained.values()):
            assert stream.ring.bytes == sum(weight for _, weight, _ in stream.ring._chunks)
            assert stream.ring.num_tokens <= LIMITS.ring or stream.replay or not stream.attached
            assert len(stream.output) == stream.num_tokens - stream.base

    @invariant()
    def nothing_leaks(self) -> None:
        """Whatever runs in the engine is somebody's, or is being ended; and who has credit, has it in the engine."""
        session = self.session
        for run in self.engine.runs.values():
            stream = session._table.in_engine.get(run.key)
            if run.opened and run.ended is None and not run.cancelled:
                assert stream is not None, f"{run} runs for nobody"
                assert stream.end is None
                assert run.credit == (None if stream.credit is None else stream.credit - stream.base), "credit has been lost"
        assert session._table.in_engine.keys() <= self.by_key.keys()
        for key in session._table.running:
            assert session._table.in_engine[key].end is None
            assert key in self.engine.runs

    def teardown(self) -> None:
        """Let everything come to its end: each stream has exactly one last frame, or the session has said that it forgot it."""
        if not hasattr(self, "session"):
            return
        self.come_back()
        for _ in range(50):
            while unopened := [run for run in self.engine.runs.values() if not run.opened]:
                self.open_group(unopened[0].group)
            for run in self.unended():
                if not run.parked or run.cancelled:
                    self.engine.finish(run, "stop", "")
            self.hear(1000)
            self.write(1000, busy=False, seconds=0.1)
            self.deliver(1000)
            if not self.engine.runs and not self.lives:
                break
            if self.unended():
                self.wait(LIMITS.stall_s + 1, late=False)  # who waits for credit that never comes
        assert self.engine.runs == {}
        assert self.refusals == []
        assert self.lives == {}, "streams without a last frame"
        self.now += LIMITS.resume_s
        self.session.tick(self.now)
        assert self.session.num_streams == 0
        assert self.session.next_due(self.now) is None
        assert (self.session.retained_bytes, self.session.next_tick()) == (0, math.inf)
        self.carry_out(self.session.detach(self.now))
        assert self.session.closed, "a session that nobody needs goes on"

    def come_back(self) -> None:
        """As a client does: over a new connection, for everything that has no end yet."""
        self.write(1000, busy=False, seconds=0.1)
        self.deliver(1000)
        if not self.connected:
            self.connect()
        for stream_id, life in list(self.lives.items()):
            self.write(1000, busy=False, seconds=0.0)
            self.deliver(1000)
            if life.away and self.lives.get(stream_id) is life:
                self.resume(None, stream_id, "true")  # type: ignore[arg-type]  # draws nothing


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(settings.default, max_examples=250, stateful_step_count=80)

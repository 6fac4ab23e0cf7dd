"""A client's streams, without sockets: frames and engine events in, messages and wishes out. It outlives its connection.

    shell                                      Session
    a connection has said hello   -> attach()  -> `welcome`
    frame from the socket         -> receive() -> actions: open, fork, grant to, or cancel streams; close the socket
    events from TextStreams       -> events()
    socket can take a frame       -> next_message(now), or next_due() tells when to ask again
    the connection is gone        -> detach()  -> its streams go on within their credit, and may be resumed
    time has passed               -> tick()    -> what nobody came back for is ended

Time is an argument; nothing here knows a clock.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, TypeVar

import msgspec

from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.bodies import Parsed, ParsedBody, parse_body, validation_error
from streamkv.protocol.handshake import Close, wrong_opcode
from streamkv.protocol.outbox import Outbox
from streamkv.protocol.outstream import OutStream, SessionLimits, StreamState
from streamkv.sampling_params import MAX_N
from streamkv.text import events as text

__all__ = ["Action", "CancelStream", "Close", "ForkOf", "GrantCredit", "OpenStreams", "Session", "SessionState"]

_ID: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID_RULE: Final = "1 to 64 characters A-Z a-z 0-9 _ . -"
_MAX_BAD_FRAMES: Final = 32
_RECORD_BYTES: Final = 4096
_TOKEN_BYTES: Final = 40  # of an int in a list
_BODY_FACTOR: Final = 4
"""Objects are larger than their JSON, and a body is kept as it came and as it was read."""

T = TypeVar("T")


class SessionState(Enum):
    """Where a session is."""

    OPEN = "open"
    DRAINING = "draining"
    """Attached; the server is going away."""
    DETACHED = "detached"
    """No connection; its streams wait to be resumed."""
    CLOSED = "closed"


SESSION_MOVES: Final[dict[SessionState, frozenset[SessionState]]] = {
    SessionState.OPEN: frozenset({SessionState.DRAINING, SessionState.DETACHED, SessionState.CLOSED}),
    SessionState.DRAINING: frozenset({SessionState.DETACHED, SessionState.CLOSED}),
    SessionState.DETACHED: frozenset({SessionState.OPEN, SessionState.CLOSED}),
    SessionState.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class ForkOf:
    """What a fork goes on from.

    Attributes:
        record: of the parent, as the shell gave it to `opened`.
        output: the parent's own output tokens that the fork keeps.
        chars: characters of the parent's text that the client has of them; None = not known, so that nothing is said twice.
        added: text or messages that follow, or None.
        max_tokens_given: the request says how many tokens to generate; else it is what the parent has left.
    """

    record: Any
    output: tuple[int, ...]
    chars: int | None
    added: Any
    max_tokens_given: bool


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Prepare and submit: one prompt, or one input per stream; answer for each with `Session.opened` or `Session.refused`.

    Attributes:
        keys: names of the streams between session and shell, never used twice; a client may give an id a second life.
        credit: output tokens that the client accepts; None = no limit.
    """

    keys: tuple[str, ...]
    body: Parsed
    priority: int
    credit: int | None = None
    fork: ForkOf | None = None


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """The client accepts so many output tokens of this stream."""

    key: str
    limit: int


@dataclass(frozen=True, slots=True)
class CancelStream:
    """Cancel what runs under this key."""

    key: str


Action = OpenStreams | GrantCredit | CancelStream | Close


class Session:
    """The streams of one client. Not thread-safe; one shell drives it."""

    def __init__(
        self,
        codec: m.Codec,
        limits: SessionLimits,
        *,
        session_id: str,
        epoch: str,
        server: str,
        models: tuple[str, ...],
        max_model_len: int,
        now: float,
    ) -> None:
        """A new one, attached to the connection that has just said hello in this codec."""
        self.state = SessionState.OPEN
        self.id = session_id
        self._codec = codec
        self._limits = limits
        self._epoch = epoch
        self._server = server
        self._models = models
        self._max_model_len = max_model_len
        self._outbox = Outbox(limits)
        self._streams: dict[str, OutStream] = {}  # by id; their last frame has not been taken by a writer
        self._engine: dict[str, OutStream] = {}  # by key; the engine has still something to say of them
        self._retained: OrderedDict[str, OutStream] = OrderedDict()  # whose last frame has; oldest first
        self._kept = 0  # bytes of those
        self._running: set[str] = set()  # keys
        self._waiting: list[OpenStreams] = []  # not a deque, which takes half a kilobyte of every idle session
        self._next_key = 0
        self._bad_frames = 0
        self.num_replayed = 0  # tokens sent once more after resumes
        self._welcome(resumed=False)
        self._now = now

    # -- connections come and go ----------------------------------------------------------------------------------

    def attach(self, codec: m.Codec, now: float) -> None:
        """A new connection has named this session; its streams wait until it resumes them."""
        assert self.state is SessionState.DETACHED, "detach the old connection first"
        self._now = now
        self._codec = codec
        self._bad_frames = 0
        self._move(SessionState.OPEN)
        self._welcome(resumed=True)

    def detach(self, now: float) -> list[Action]:
        """The connection is gone: streams that are to live on do, the others must be cancelled."""
        if self.state in (SessionState.DETACHED, SessionState.CLOSED):
            return []
        self._now = now
        self._move(SessionState.DETACHED)
        self._outbox.clear()
        actions: list[Action] = []
        for stream in list(self._streams.values()):
            stream.attached = False
            stream.replay.clear()
            if stream.keeps:
                stream.since = now
            else:
                actions += self._give_up(stream)
        return [*actions, *self.start_waiting(), *self._closed_if_empty()]

    def close(self) -> list[Action]:
        """Everything ends, nothing is sent any more; these must be cancelled."""
        if self.state is SessionState.CLOSED:
            return []
        self._move(SessionState.CLOSED)
        running = sorted(self._running)
        self._waiting.clear()
        self._running.clear()
        self._streams.clear()
        self._engine.clear()
        self._retained.clear()
        self._kept = 0
        self._outbox.clear(keep_control=True)
        return [CancelStream(key) for key in running]

    def drain(self, deadline_ms: int, reason: str) -> None:
        """Take no new streams; those that run may finish."""
        if self.state is SessionState.OPEN:
            self._move(SessionState.DRAINING)
            self._outbox.say(m.Drain(deadline_ms, reason))

    def _welcome(self, *, resumed: bool) -> None:
        limits = self._limits
        self._outbox.say(
            m.Welcome(
                session=self.id,
                epoch=self._epoch,
                server=self._server,
                models=list(self._models),
                limits=m.Limits(
                    streams=limits.streams,
                    queue=limits.queue,
                    window=limits.window,
                    frame=limits.frame,
                    hello_s=limits.hello_s,
                    ring=limits.ring,
                ),
                heartbeat_s=limits.heartbeat_s,
                grace_s=limits.grace_s,
                resume_s=limits.resume_s,
                resumed=resumed,
            )
        )

    # -- in: frames -----------------------------------------------------------------------------------------------

    def receive(self, data: bytes, *, is_text: bool, now: float) -> list[Action]:
        """One frame from the client, after its hello."""
        if self.state not in (SessionState.OPEN, SessionState.DRAINING):
            return []
        self._now = now
        if is_text != self._codec.text:
            return self._break_off(wrong_opcode(self._codec))
        try:
            message = self._codec.decode_client(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return self._malformed(data, error)
        return self._handle(message)

    def _handle(self, message: m.ClientMessage) -> list[Action]:
        match message:
            case m.Create():
                return self._create(message)
            case m.Credit():
                return self._credit(message)
            case m.Cancel():
                return self._cancel(message.id)
            case m.Resume():
                return self._resume(message)
            case m.Fork():
                return self._fork(message)
            case m.Ping():
                if not math.isfinite(message.ts):
                    return self._notice("invalid_request", "ts must be a finite number", "ts")
                self._outbox.say(m.Pong(message.ts, 0.0))
                return []
            case m.Bye():
                goodbye: list[Action] = self.close() if message.cancel else self.detach(self._now)
                return [*goodbye, Close(1000, "bye")]
            case m.Hello():
                return self._break_off(Close(4400, "second_hello: hello is sent once"))
            case _:
                raise AssertionError(f"unhandled {message}")

    def _break_off(self, close: Close) -> list[Action]:
        """A client that breaks the protocol has nothing to come back for."""
        return [*self.close(), close]

    def _malformed(self, data: bytes, error: Exception) -> list[Action]:
        """A frame that is no message: name the field, keep the connection and its streams."""
        self._bad_frames += 1
        if self._bad_frames > _MAX_BAD_FRAMES:
            return self._break_off(Close(1008, "too_many_bad_frames: fix the client"))
        try:
            loose = self._codec.decode_any(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError):
            return self._notice("invalid_request", validation_error(error).message, None)
        invalid = validation_error(error)
        tag = loose.get("t") if isinstance(loose, dict) else None
        if not isinstance(tag, str) or not any(tag == kind.__struct_config__.tag for kind in m.ClientMessage.__args__):
            return self._notice("unknown_type", "t must name a message of the protocol", "t")
        ids = self._new_ids(loose) if tag in ("create", "fork") else ()
        if ids:
            return self._refuse_all(ids, "invalid_request", invalid.message, invalid.param)
        return self._notice("invalid_request", invalid.message, invalid.param)

    def _new_ids(self, loose: dict[Any, Any]) -> tuple[str, ...]:
        """The streams that a malformed message meant to make, as far as it tells; none if any of them is not to be named."""
        several = loose.get("ids")
        ids = several if isinstance(several, list) else [loose.get("id")]
        if (several is not None and loose.get("id") is not None) or not 1 <= len(ids) <= MAX_N:
            return ()
        if not all(
            isinstance(stream_id, str) and _ID.fullmatch(stream_id) and stream_id not in self._streams for stream_id in ids
        ):
            return ()
        return tuple(dict.fromkeys(ids))

    # -- in: new streams ------------------------------------------------------------------------------------------

    def _create(self, message: m.Create) -> list[Action]:
        ids = self._ids_of(message)
        if not ids:
            return []
        parsed = self._parsed(ids, lambda: self._parse(message.api, message.body, len(ids)))
        if parsed is None:
            return []
        return self._open(ids, message, parsed, (message.api, message.body))

    def _fork(self, message: m.Fork) -> list[Action]:
        ids = self._ids_of(message)
        if not ids:
            return []
        parent = self._streams.get(message.from_) or self._retained.get(message.from_)
        if parent is None or parent.record is None or parent.body is None:
            return self._refuse_all(ids, "fork_gone", "the stream to fork has not begun, or is no longer kept", "from")
        at = parent.num_tokens if message.at is None else message.at
        if not parent.base <= at <= parent.num_tokens:
            wrong = f"at must be from {parent.base} to {parent.num_tokens}, the tokens of the stream so far"
            return self._refuse_all(ids, "invalid_request", wrong, "at")
        if message.max is not None and message.max < at:
            return self._refuse_all(ids, "invalid_request", "max is an offset of the fork, and must be at least `at`", "max")
        merged = self._parsed(ids, lambda: self._merge(parent, message.body, len(ids)))
        if merged is None:
            return []
        body, added, given, raw = merged
        fork = ForkOf(parent.record, tuple(parent.output[: at - parent.base]), _chars_at(parent, at), added, given)
        return self._open(ids, message, body, raw, base=at, fork=fork)

    def _merge(
        self, parent: OutStream, overrides: msgspec.Raw, num_ids: int
    ) -> tuple[ParsedBody, Any, bool, tuple[str, msgspec.Raw]]:
        """The parent's body with what the fork changes; (parsed, what is added, are max_tokens given, as it came)."""
        assert parent.body is not None
        api, original = parent.body
        own: Any = self._codec.decode_any(overrides) if bytes(overrides) else {}
        if not isinstance(own, dict):
            raise InvalidRequestError("body must be an object", param="body")
        name = "messages" if api == "chat" else "prompt"
        # Its parent is echoed already, and as many samples as ids are meant.
        merged = {key: value for key, value in (original | own).items() if key not in ("n", "echo")}
        encoded = msgspec.Raw(self._codec.encode(merged))
        parsed = self._parse(api, encoded, num_ids)
        if not isinstance(parsed, ParsedBody):
            raise InvalidRequestError("only streams that generate can be forked", param="from")
        given = any(key in own for key in ("max_tokens", "max_completion_tokens"))
        return parsed, parsed.prompt if name in own else None, given, (api, encoded)

    def _ids_of(self, message: m.Create | m.Fork) -> tuple[str, ...]:
        """The names of the new streams; none if the message has been answered already."""
        ids = tuple(message.ids) if message.ids is not None else (message.id,) if message.id is not None else ()
        param = "id" if message.ids is None else "ids"
        if not ids or (message.ids is not None and message.id is not None):
            self._notice("invalid_request", "give id, or ids for several samples", param)
            return ()
        if len(ids) > MAX_N or len(set(ids)) != len(ids) or not all(_ID.fullmatch(stream_id) for stream_id in ids):
            self._notice("invalid_request", f"1 to {MAX_N} different ids of {_ID_RULE}", param)
            return ()
        taken = next((stream_id for stream_id in ids if stream_id in self._streams), None)
        if taken is not None:
            # Without an id: with one it would read as the end of the stream that is alive under it.
            self._notice("stream_exists", f"stream {taken} is alive; choose another id", "id")
            return ()
        limit = self._limits.streams + self._limits.queue
        if self.state is SessionState.DRAINING:
            self._refuse_all(ids, "draining", "the server is shutting down; connect to another one", None, retryable=True)
        elif len(self._streams) + len(ids) > limit or len(ids) > self._limits.streams:
            self._refuse_all(ids, "too_many_streams", f"at most {limit} streams per connection", None, retryable=True)
        elif message.max is not None and not 0 <= message.max <= m.MAX_CREDIT:
            self._refuse_all(ids, "invalid_request", f"max must be an integer from 0 to {m.MAX_CREDIT}", "max")
        elif not -(2**31) <= message.priority < 2**31:
            self._refuse_all(ids, "invalid_request", "priority must be a 32-bit integer", "priority")
        else:
            return ids
        return ()

    def _parse(self, api: str, body: msgspec.Raw, num_ids: int) -> Parsed:
        return parse_body(api, body, self._codec, models=self._models, num_ids=num_ids, max_model_len=self._max_model_len)

    def _parsed(self, ids: tuple[str, ...], parse: Callable[[], T]) -> T | None:
        """What `parse` gives, or None once the streams have been told why there is nothing."""
        try:
            return parse()
        except StreamKVError as error:
            self._refuse_all(ids, error.code, error.message, error.param)
            return None

    def _open(
        self,
        ids: tuple[str, ...],
        message: m.Create | m.Fork,
        parsed: Parsed,
        body: tuple[str, msgspec.Raw],
        *,
        base: int = 0,
        fork: ForkOf | None = None,
    ) -> list[Action]:
        credit = None if message.max is None or message.max == m.MAX_CREDIT else message.max
        keys: list[str] = []
        loose = self._codec.decode_any(body[1])
        for stream_id in ids:
            self._drop_retained(stream_id)  # its name has a new life
            key = f"{stream_id}#{self._next_key}"
            self._next_key += 1
            keeps = message.on_disconnect == "grace"
            stream = OutStream(stream_id, self._now, key=key, base=base, credit=credit, keeps=keeps)
            stream.body, stream.body_bytes = (body[0], loose), _BODY_FACTOR * len(bytes(body[1]))
            if fork is not None and fork.added is None:
                stream.inherited_chars = fork.chars
            self._streams[stream_id] = self._engine[key] = stream
            self._outbox.attach(stream, self._now)
            keys.append(key)
        self._waiting.append(OpenStreams(tuple(keys), parsed, message.priority, None if credit is None else credit - base, fork))
        return self.start_waiting()

    # -- in: streams that exist -----------------------------------------------------------------------------------

    def _credit(self, message: m.Credit) -> list[Action]:
        """Monotonic, so that duplicates and a wrong order are harmless; unknown and finished ids are ignored."""
        if not _ID.fullmatch(message.id):
            return self._notice("invalid_request", f"id must be {_ID_RULE}", "id")
        for name, value in (("max", message.max), ("ack", message.ack)):
            if not 0 <= value <= m.MAX_CREDIT:
                return self._notice("invalid_request", f"{name} must be an integer from 0 to {m.MAX_CREDIT}", name)
        stream = self._streams.get(message.id)
        if stream is None:
            retained = self._retained.get(message.id)
            if retained is not None:
                retained.confirm(message.ack)
            return []
        stream.confirm(min(message.ack, stream.offset))
        return self._raise_credit(stream, message.max)

    def _raise_credit(self, stream: OutStream, limit: int) -> list[Action]:
        if stream.credit is None or limit <= stream.credit or stream.state in (StreamState.CANCELLING, StreamState.DONE):
            return []
        stream.credit = limit
        if stream.state is StreamState.STALLED:
            stream.go_on()
        # Samples of one prompt start with one credit; what each has beyond that is granted once it is opened.
        return [GrantCredit(stream.key, limit - stream.base)] if stream.key in self._running else []

    def _resume(self, message: m.Resume) -> list[Action]:
        if not _ID.fullmatch(message.id):
            return self._notice("invalid_request", f"id must be {_ID_RULE}", "id")
        stream = self._streams.get(message.id) or self._retained.get(message.id)
        here = stream is not None and stream.attached
        # Without an id if it is alive here: with one it would read as its end.
        named = None if here else message.id
        wrong_epoch = message.epoch is not None and message.epoch != self._epoch
        sent = stream.offset if stream is not None else 0
        if stream is None or wrong_epoch or not stream.resume(message.from_):
            self._outbox.say(m.Error("resume_gone", "this part of the stream is no longer kept; create it again", named, "id"))
            if stream is None or here or wrong_epoch:
                return []
            return [*self._give_up(stream), *self.start_waiting()]
        if self._drop_retained(message.id):
            self._streams[message.id] = stream
        if not here and stream.end is None:
            stream.since = self._now
        self.num_replayed += max(0, sent - message.from_)
        self._outbox.say(m.Resumed(message.id, message.from_, stream.state.value))
        self._outbox.attach(stream, self._now)
        return [] if message.max is None else self._raise_credit(stream, min(max(0, message.max), m.MAX_CREDIT))

    def _cancel(self, stream_id: str) -> list[Action]:
        """Idempotent; unknown and finished ids are ignored, names that no stream can have are not."""
        if not _ID.fullmatch(stream_id):
            return self._notice("invalid_request", f"id must be {_ID_RULE}", "id")
        stream = self._streams.get(stream_id)
        if stream is None or stream.state in (StreamState.CANCELLING, StreamState.DONE):
            return []
        if stream.key in self._running:
            stream.move(StreamState.CANCELLING)
            return [CancelStream(stream.key)]
        # Still waiting here: it ends at once; its siblings, if any, wait on without it.
        self._leave_queue(stream.key)
        done = m.Done(stream_id, stream.base, "cancelled", m.Usage(0, 0, 0), m.Timings(0.0, 0.0, 0.0, 0.0))
        self._finish(stream, done, unopened=True)
        return self.start_waiting()

    def _leave_queue(self, key: str) -> None:
        position, wish = next((position, wish) for position, wish in enumerate(self._waiting) if key in wish.keys)
        rest = tuple(other for other in wish.keys if other != key)
        if rest:
            body = wish.body
            if not isinstance(body, ParsedBody):  # one input per stream
                inputs = tuple(given for other, given in zip(wish.keys, body.inputs, strict=True) if other != key)
                body = msgspec.structs.replace(body, inputs=inputs)
            self._waiting[position] = replace(wish, keys=rest, body=body)
        else:
            del self._waiting[position]

    # -- in: the engine -------------------------------------------------------------------------------------------

    def wants(self, keys: tuple[str, ...]) -> bool:
        """False if all of these have been given up, so that nothing need be submitted."""
        return any(key in self._engine for key in keys)

    def opened(self, key: str, rid: str, prompt_tokens: int, record: Any = None) -> list[Action]:
        """The engine has taken this one.

        Args:
            rid: its name in the log.
            record: what a fork of it will need.

        Returns:
            What must be told to the engine now.
        """
        stream = self._engine.get(key)
        if stream is None:
            return [CancelStream(key)]  # given up while the request was on its way
        stream.record = record
        stream.body_bytes += _RECORD_BYTES + _TOKEN_BYTES * prompt_tokens
        self._outbox.open(stream, m.Accepted(stream.id, rid, prompt_tokens))
        if stream.end is not None:
            del self._engine[key]  # its last event has come before this
            return []
        if stream.state is StreamState.CANCELLING:
            return [CancelStream(key)]
        if stream.credit is None:
            return []
        if stream.credit == stream.base and stream.state is StreamState.QUEUED:
            # It sleeps in the engine, which says nothing of who may not even begin.
            self._status(stream, text.Status(key, "stalled"))
        # It may have grown while the request was on its way.
        return [GrantCredit(key, stream.credit - stream.base)]

    def refused(self, keys: tuple[str, ...], error: StreamKVError) -> list[Action]:
        """The engine cannot take these. Returns what may start in their place."""
        # `create` itself has been checked; the engine can only mind what is in the body.
        param = None if error.param is None else f"body.{error.param}"
        retry_after_ms = None if error.retry_after_s is None else math.ceil(error.retry_after_s * 1000)
        for key in keys:
            stream = self._engine.get(key)
            if stream is not None:
                refusal = m.Error(error.code, error.message, stream.id, param, error.retryable, retry_after_ms)
                self._finish(stream, refusal, unopened=True)
        return self.start_waiting()

    def events(self, events: list[text.StreamEvent], now: float) -> list[Action]:
        """What a step produced, by key. Returns what may start now, and what nobody will ever read."""
        self._now = now
        actions: list[Action] = []
        stalled: set[str] = set()  # by these events: the text that has used up the credit comes with them
        ended = False
        for event in events:
            stream = self._engine.get(event.id)
            if stream is None or stream.end is not None:
                continue  # given up, or an engine that goes on after a last event
            if isinstance(event, text.Delta):
                if stream.state is StreamState.STALLED and event.id not in stalled:
                    stream.go_on()  # credit and the news that there was none have crossed
                self._outbox.text(stream, event, now)
                if not stream.attached and stream.num_tokens - stream.ring.start > self._limits.ring:
                    actions += self._give_up(stream)  # what has been forgotten cannot be resumed: do not compute on
            elif isinstance(event, text.PromptRead):
                self._outbox.prompt(stream, event.logprobs)
            elif isinstance(event, text.Status):
                stalled.add(event.id if event.state == "stalled" else "")
                self._status(stream, event)
            else:
                self._finish(stream, _ending(event, stream))
                ended = True
        return [*actions, *self.start_waiting()] if ended or actions else []

    def _status(self, stream: OutStream, event: text.Status) -> None:
        if stream.state is StreamState.CANCELLING:
            return
        if stream.state is StreamState.STALLED and event.state == "preempted":
            return  # stalled streams lose their blocks first; this one is stalled all the same, and its time runs
        if event.state == "stalled" and stream.attached:
            stream.since = self._now
        stream.move(StreamState(event.state))
        self._outbox.status(stream, m.Status(stream.id, event.state, event.cached))

    def start_waiting(self) -> list[Action]:
        """Streams that waited for a place among the running ones."""
        actions: list[Action] = []
        while self._waiting and len(self._running) + len(self._waiting[0].keys) <= self._limits.streams:
            wish = self._waiting.pop(0)
            self._running.update(wish.keys)
            actions.append(wish)
        return actions

    def _finish(self, stream: OutStream, end: m.Done | m.Error, *, unopened: bool = False) -> None:
        if stream.end is None:
            stream.move(StreamState.DONE)
            self._running.discard(stream.key)
            if stream.opened or unopened:
                self._engine.pop(stream.key, None)
            stream.since = self._now
            self._outbox.end(stream, end, unopened=unopened)

    # -- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """End what has waited for too long, forget what nobody came back for."""
        self._now = now
        actions: list[Action] = []
        for stream in list(self._streams.values()):
            if self._overdue(stream) > now:
                continue
            if stream.attached:
                actions += self._end_stalled(stream)
            else:
                actions += self._give_up(stream)
        while self._retained and next(iter(self._retained.values())).since + self._limits.resume_s <= now:
            self._drop_retained(next(iter(self._retained)))
        return [*actions, *self.start_waiting(), *self._closed_if_empty()]

    def next_tick(self) -> float:
        """When `tick` has something to do; inf = not before something happens."""
        times = [self._overdue(stream) for stream in self._streams.values()]
        if self._retained:
            times.append(next(iter(self._retained.values())).since + self._limits.resume_s)
        return min(times, default=math.inf)

    def _overdue(self, stream: OutStream) -> float:
        """When its next time limit ends."""
        if not stream.attached:
            return stream.since + (self._limits.resume_s if stream.end is not None else self._limits.grace_s)
        return stream.since + self._limits.stall_s if stream.state is StreamState.STALLED else math.inf

    def _end_stalled(self, stream: OutStream) -> list[Action]:
        message = f"no credit for {self._limits.stall_s:g} seconds; grant some, or cancel what is not read"
        self._finish(stream, m.Error("stalled_timeout", message, stream.id, retryable=True))
        return [CancelStream(stream.key)]

    def _give_up(self, stream: OutStream) -> list[Action]:
        """Nobody will read it: forget it, and let the engine do so."""
        self._outbox.forget(stream)
        if self._drop_retained(stream.id):
            return []
        del self._streams[stream.id]
        self._engine.pop(stream.key, None)
        if stream.key in self._running:
            self._running.discard(stream.key)
            return [CancelStream(stream.key)]
        if stream.end is None:
            self._leave_queue(stream.key)
        return []

    def _closed_if_empty(self) -> list[Action]:
        """A session that nobody can come back to for anything is over."""
        if self.state is SessionState.DETACHED and not self._streams and not self._retained:
            return self.close()
        return []

    def shrink(self) -> int:
        """Forget the oldest finished stream; the bytes that this gives back, 0 if there is none."""
        before = self._kept
        if self._retained:
            self._drop_retained(next(iter(self._retained)))
        return before - self._kept

    def _drop_retained(self, stream_id: str) -> bool:
        """Forget a finished stream; False if there is none of that name."""
        stream = self._retained.pop(stream_id, None)
        if stream is None:
            return False
        self._kept -= stream.kept
        return True

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True once nothing of it is left."""
        return self.state is SessionState.CLOSED

    @property
    def attached(self) -> bool:
        """True while a connection is there."""
        return self.state in (SessionState.OPEN, SessionState.DRAINING)

    @property
    def num_streams(self) -> int:
        """Streams whose last frame has not been taken yet."""
        return len(self._streams)

    @property
    def retained_bytes(self) -> int:
        """Memory of its streams, roughly."""
        return self._kept + sum(stream.bytes for stream in self._streams.values())

    @property
    def outbound_bytes(self) -> int:
        """Text that waits for the reader."""
        return self._outbox.bytes

    @property
    def too_slow(self) -> bool:
        """True if more text waits than the reader may be behind."""
        return self._outbox.bytes > self._limits.outbound

    @property
    def crowded(self) -> bool:
        """True if the client's next frames should not be read before it has taken the answers to its earlier ones."""
        return self._outbox.crowded

    # -- out ------------------------------------------------------------------------------------------------------

    def next_message(self, now: float, *, busy: bool = False) -> m.ServerMessage | None:
        """The next message to send, or None if none is due.

        Args:
            busy: other output is waiting in the socket: text may be merged a little longer.
        """
        message = self._outbox.next_message(now, busy=busy)
        if isinstance(message, (m.Done, m.Error)) and message.id is not None:
            self._retain(message, now)
        return message

    def next_due(self, now: float, *, busy: bool = False) -> float | None:
        """Seconds until `next_message` has something, 0 = now; None = not before something comes in."""
        return self._outbox.next_due(now, busy=busy)

    def _retain(self, last: m.Done | m.Error, now: float) -> None:
        """The last frame is on its way and may be lost with the connection: keep what could be asked for again."""
        assert last.id is not None
        stream = self._streams.get(last.id)
        if stream is None or stream.end is not last:
            return  # an error for an id that never lived
        del self._streams[last.id]
        if stream.keeps and stream.record is not None:
            stream.attached = False
            stream.since = now
            stream.kept = stream.bytes
            self._retained[last.id] = stream
            self._kept += stream.kept
            while self._kept > self._limits.retained:
                self._drop_retained(next(iter(self._retained)))

    # -- small things ---------------------------------------------------------------------------------------------

    def _move(self, state: SessionState) -> None:
        assert state in SESSION_MOVES[self.state], f"session: {self.state.value} -> {state.value}"
        self.state = state

    def _notice(self, code: str, message: str, param: str | None) -> list[Action]:
        self._outbox.say(m.Error(code, message, None, param))
        return []

    def _refuse_all(
        self, ids: tuple[str, ...], code: str, message: str, param: str | None, *, retryable: bool = False
    ) -> list[Action]:
        for stream_id in ids:
            self._outbox.say(m.Error(code, message, stream_id, param, retryable))
        return []


def _chars_at(stream: OutStream, at: int) -> int | None:
    """Characters of a stream's text that its client has, or will have, of the tokens before `at`."""
    before = stream.inherited_chars
    if at == stream.base or before is None:
        return before
    own = stream.chars + sum(map(len, stream.pieces)) if at == stream.num_tokens else stream.ring.chars_at(at)
    return None if own is None else before + own


def _ending(event: text.Finished, stream: OutStream) -> m.Done | m.Error:
    if event.error is not None:
        code, message = event.error
        return m.Error(code, message, stream.id, retryable=code == "engine_lost")
    timings, score = event.timings, event.score
    perplexity = score.perplexity if score is not None else 0.0
    return m.Done(
        stream.id,
        stream.base + event.completion_tokens,
        event.finish_reason,
        m.Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        m.Timings(*(round(part, 6) for part in (timings.queue, timings.prefill, timings.ttft, timings.decode))),
        embedding=None if event.embedding is None else event.vector(),
        score=None if score is None else m.Score(score.logprob, score.tokens, perplexity if math.isfinite(perplexity) else None),
        why=_why(event.why),
    )


def _why(why: text.Why) -> m.Why:
    preempted, stalled, lag = (round(part, 6) or None for part in (why.preempted, why.stalled, why.lag))
    return m.Why(why.chunks, why.preemptions, preempted, stalled, lag, why.miss, why.miss_at)

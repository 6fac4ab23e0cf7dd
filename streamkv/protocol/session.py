"""One connection, without its socket: frames and engine events in, messages and wishes out.

    shell                                    Session
    frame from the socket     -> receive()   -> actions: open or cancel streams, close the socket
    events from TextStreams   -> events()
    socket can take a frame   -> next_message(now), or next_due() tells when to ask again

Time is an argument; nothing here knows a clock. Credit, resume and fork will be further messages on the same streams.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec

from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.bodies import Parsed, parse_body, validation_error
from streamkv.protocol.outbox import Outbox, OutStream, SessionLimits, StreamState
from streamkv.sampling_params import MAX_N
from streamkv.text import events as text

__all__ = ["Action", "CancelStream", "Close", "ConnectionState", "OpenStreams", "Session", "SessionLimits", "StreamState"]

_ID: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID_RULE: Final = "1 to 64 characters A-Z a-z 0-9 _ . -"
_MAX_BAD_FRAMES: Final = 32


class ConnectionState(Enum):
    """Where a connection is."""

    AWAIT_HELLO = "await_hello"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


CONNECTION_MOVES: Final[dict[ConnectionState, frozenset[ConnectionState]]] = {
    ConnectionState.AWAIT_HELLO: frozenset({ConnectionState.OPEN, ConnectionState.CLOSED}),
    ConnectionState.OPEN: frozenset({ConnectionState.DRAINING, ConnectionState.CLOSED}),
    ConnectionState.DRAINING: frozenset({ConnectionState.CLOSED}),
    ConnectionState.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Prepare and submit: one prompt, or one input per id; answer for each id with `Session.opened` or `Session.refused`."""

    ids: tuple[str, ...]
    body: Parsed
    priority: int


@dataclass(frozen=True, slots=True)
class CancelStream:
    """Cancel what runs under this id."""

    id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is pending, then close the socket with this code."""

    code: int
    reason: str


Action = OpenStreams | CancelStream | Close


class Session:
    """The state of one connection. Not thread-safe; one shell drives it."""

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
    ) -> None:
        """Start waiting for `hello`."""
        self.state = ConnectionState.AWAIT_HELLO
        self._codec = codec
        self._limits = limits
        self._identity = (session_id, epoch, server)
        self._models = models
        self._max_model_len = max_model_len
        self._outbox = Outbox(limits)
        self._streams = self._outbox.streams  # those whose last frame has not been taken
        self._running: set[str] = set()
        self._waiting: deque[OpenStreams] = deque()
        self._bad_frames = 0

    # -- in: frames -----------------------------------------------------------------------------------------------

    def receive(self, data: bytes, *, is_text: bool, now: float) -> list[Action]:
        """One frame from the client."""
        if self.state is ConnectionState.CLOSED:
            return []
        if is_text != self._codec.text:
            kind = "text" if self._codec.text else "binary"
            return self._close(1003, f"wrong_opcode: {self._codec.subprotocol} uses {kind} frames")
        try:
            message = self._codec.decode_client(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return self._malformed(data, error)
        if isinstance(message, m.Hello):
            return self._hello()
        if self.state is ConnectionState.AWAIT_HELLO:
            return self._close(4400, "hello_expected: the first frame must be hello")
        return self._handle(message, now)

    def _handle(self, message: m.ClientMessage, now: float) -> list[Action]:
        match message:
            case m.Create():
                return self._create(message, now)
            case m.Cancel():
                return self._cancel(message.id)
            case m.Ping():
                if not math.isfinite(message.ts):
                    return self._notice("invalid_request", "ts must be a finite number", "ts")
                self._outbox.say(m.Pong(message.ts, 0.0))
                return []
            case m.Bye():
                actions: list[Action] = list(self.lost())
                return [*actions, Close(1000, "bye")]
            case m.Credit():
                return self._notice("invalid_request", "credit is not available yet: streams have no limit", "max")
            case m.Resume():
                return self._resume(message.id)
            case m.Fork():
                return self._notice("invalid_request", "fork is not available yet", "from")
            case _:
                raise AssertionError(f"unhandled {message}")

    def _hello(self) -> list[Action]:
        if self.state is not ConnectionState.AWAIT_HELLO:
            return self._close(4400, "second_hello: hello is sent once")
        session_id, epoch, server = self._identity
        limits = self._limits
        self._move(ConnectionState.OPEN)
        self._outbox.say(
            m.Welcome(
                session=session_id,
                epoch=epoch,
                server=server,
                models=list(self._models),
                limits=m.Limits(streams=limits.streams, queue=limits.queue, frame=limits.frame, hello_s=limits.hello_s),
                heartbeat_s=limits.heartbeat_s,
            )
        )
        return []

    def _malformed(self, data: bytes, error: Exception) -> list[Action]:
        """A frame that is no message: name the field, keep the connection and its streams."""
        if self.state is ConnectionState.AWAIT_HELLO:
            invalid = validation_error(error)
            return self._close(4400, f"malformed: the first frame must be hello; {invalid.param or 'it'}: {invalid.message}")
        self._bad_frames += 1
        if self._bad_frames > _MAX_BAD_FRAMES:
            return self._close(1008, "too_many_bad_frames: fix the client")
        try:
            loose = self._codec.decode_any(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError):
            return self._notice("invalid_request", validation_error(error).message, None)
        invalid = validation_error(error)
        tag = loose.get("t") if isinstance(loose, dict) else None
        if not isinstance(tag, str) or not any(tag == kind.__struct_config__.tag for kind in m.ClientMessage.__args__):
            return self._notice("unknown_type", "t must name a message of the protocol", "t")
        ids = self._new_ids(loose) if tag == "create" else ()
        if ids:
            return self._refuse_all(ids, "invalid_request", invalid.message, invalid.param)
        return self._notice("invalid_request", invalid.message, invalid.param)

    def _new_ids(self, loose: dict[Any, Any]) -> tuple[str, ...]:
        """The streams that a `create` meant to make, as far as a malformed one tells; none if any of them is not to be named."""
        several = loose.get("ids")
        ids = several if isinstance(several, list) else [loose.get("id")]
        if (several is not None and loose.get("id") is not None) or not 1 <= len(ids) <= MAX_N:
            return ()
        if not all(
            isinstance(stream_id, str) and _ID.fullmatch(stream_id) and stream_id not in self._streams for stream_id in ids
        ):
            return ()
        return tuple(dict.fromkeys(ids))

    # -- in: streams ----------------------------------------------------------------------------------------------

    def _create(self, message: m.Create, now: float) -> list[Action]:
        ids = tuple(message.ids) if message.ids is not None else (message.id,) if message.id is not None else ()
        param = "id" if message.ids is None else "ids"
        if not ids or (message.ids is not None and message.id is not None):
            return self._notice("invalid_request", "give id, or ids for several samples", param)
        if len(ids) > MAX_N or len(set(ids)) != len(ids) or not all(_ID.fullmatch(stream_id) for stream_id in ids):
            return self._notice("invalid_request", f"1 to {MAX_N} different ids of {_ID_RULE}", param)
        taken = next((stream_id for stream_id in ids if stream_id in self._streams), None)
        if taken is not None:
            # Without an id: with one it would read as the end of the stream that is alive under it.
            return self._notice("stream_exists", f"stream {taken} is alive; choose another id", "id")
        if self.state is ConnectionState.DRAINING:
            return self._refuse_all(ids, "draining", "the server is shutting down; connect to another one", None, retryable=True)
        if len(self._streams) + len(ids) > self._limits.streams + self._limits.queue or len(ids) > self._limits.streams:
            limit = self._limits.streams + self._limits.queue
            return self._refuse_all(ids, "too_many_streams", f"at most {limit} streams per connection", None, retryable=True)
        if message.max is not None and message.max != m.MAX_CREDIT:
            return self._refuse_all(ids, "invalid_request", "credit is not available yet: leave max out", "max")
        if not -(2**31) <= message.priority < 2**31:
            return self._refuse_all(ids, "invalid_request", "priority must be a 32-bit integer", "priority")
        try:
            body = parse_body(
                message.api, message.body, self._codec, models=self._models, num_ids=len(ids), max_model_len=self._max_model_len
            )
        except InvalidRequestError as error:
            return self._refuse_all(ids, error.code, error.message, error.param)
        for stream_id in ids:
            self._streams[stream_id] = OutStream(stream_id, now)
        wish = OpenStreams(ids, body, message.priority)
        self._waiting.append(wish)
        return self.start_waiting()

    def _resume(self, stream_id: str) -> list[Action]:
        if not _ID.fullmatch(stream_id):
            return self._notice("invalid_request", f"id must be {_ID_RULE}", "id")
        # Without an id if it is alive here: with one it would read as its end.
        named = None if stream_id in self._streams else stream_id
        self._outbox.say(m.Error("resume_gone", "resume is not available yet; create the stream again", named, "id"))
        return []

    def _cancel(self, stream_id: str) -> list[Action]:
        """Idempotent; unknown and finished ids are ignored, names that no stream can have are not."""
        if not _ID.fullmatch(stream_id):
            return self._notice("invalid_request", f"id must be {_ID_RULE}", "id")
        stream = self._streams.get(stream_id)
        if stream is None or stream.state in (StreamState.CANCELLING, StreamState.DONE):
            return []
        if stream_id in self._running:
            stream.move(StreamState.CANCELLING)
            return [CancelStream(stream_id)]
        # Still waiting here: it ends at once; its siblings, if any, wait on without it.
        position, wish = next((position, wish) for position, wish in enumerate(self._waiting) if stream_id in wish.ids)
        rest = tuple(other for other in wish.ids if other != stream_id)
        if rest:
            self._waiting[position] = OpenStreams(rest, wish.body, wish.priority)
        else:
            del self._waiting[position]
        done = m.Done(stream_id, 0, "cancelled", m.Usage(0, 0, 0), m.Timings(0.0, 0.0, 0.0, 0.0))
        self._finish(stream, done, unopened=True)
        return self.start_waiting()

    def opened(self, ids: tuple[str, ...], rid: str, prompt_tokens: int) -> list[Action]:
        """The engine has taken these. Returns cancels of those that were cancelled meanwhile."""
        cancels: list[Action] = []
        for index, stream_id in enumerate(ids):
            stream = self._streams.get(stream_id)
            if stream is None:
                continue  # the connection has been lost
            self._outbox.open(stream, m.Accepted(stream_id, f"{rid}.{index}", prompt_tokens))
            if stream.state is StreamState.CANCELLING:
                cancels.append(CancelStream(stream_id))
        return cancels

    def refused(self, ids: tuple[str, ...], error: StreamKVError) -> list[Action]:
        """The engine cannot take these. Returns what may start in their place."""
        param = error.param
        if param is not None:
            param = f"body.{param}"  # `create` itself has been checked; the engine can only mind what is in the body
        for stream_id in ids:
            stream = self._streams.get(stream_id)
            if stream is not None:
                self._finish(stream, m.Error(error.code, error.message, stream_id, param, error.retryable), unopened=True)
        return self.start_waiting()

    def events(self, events: list[text.StreamEvent], now: float) -> list[Action]:
        """What a step produced for streams of this connection. Returns what may start now."""
        ended = False
        for event in events:
            stream = self._streams.get(event.id)
            if stream is None or stream.end is not None:
                continue
            if isinstance(event, text.Delta):
                self._outbox.text(stream, event, now)
            elif isinstance(event, text.PromptRead):
                self._outbox.prompt(stream, event.logprobs)
            elif isinstance(event, text.Status):
                if stream.state is not StreamState.CANCELLING:
                    stream.move(StreamState(event.state))
                    self._outbox.status(stream, m.Status(event.id, event.state, event.cached))
            else:
                self._finish(stream, _ending(event))
                ended = True
        return self.start_waiting() if ended else []

    def start_waiting(self) -> list[Action]:
        """Streams that waited for a place among the running ones."""
        actions: list[Action] = []
        while self._waiting and len(self._running) + len(self._waiting[0].ids) <= self._limits.streams:
            wish = self._waiting.popleft()
            self._running.update(wish.ids)
            actions.append(wish)
        return actions

    def _finish(self, stream: OutStream, end: m.Done | m.Error, *, unopened: bool = False) -> None:
        if stream.end is None:
            stream.move(StreamState.DONE)
            self._running.discard(stream.id)
            self._outbox.end(stream, end, unopened=unopened)

    # -- in: the server -------------------------------------------------------------------------------------------

    def drain(self, deadline_ms: int, reason: str) -> list[Action]:
        """Take no new streams; those that run may finish. A connection that has not said hello ends."""
        if self.state is ConnectionState.AWAIT_HELLO:
            return self._close(1001, f"going_away: {reason}")
        if self.state is ConnectionState.OPEN:
            self._move(ConnectionState.DRAINING)
            self._outbox.say(m.Drain(deadline_ms, reason))
        return []

    def lost(self) -> list[CancelStream]:
        """The connection is gone or says bye: nothing is sent any more; these must be cancelled."""
        if self.state is ConnectionState.CLOSED:
            return []
        self._move(ConnectionState.CLOSED)
        running = sorted(self._running)
        self._waiting.clear()
        self._running.clear()
        self._outbox.clear()
        return [CancelStream(stream_id) for stream_id in running]

    @property
    def closed(self) -> bool:
        """True once nothing is sent any more."""
        return self.state is ConnectionState.CLOSED

    @property
    def num_streams(self) -> int:
        """Streams whose last frame has not been taken yet."""
        return len(self._streams)

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
        return self._outbox.next_message(now, busy=busy)

    def next_due(self, now: float, *, busy: bool = False) -> float | None:
        """Seconds until `next_message` has something, 0 = now; None = not before something comes in."""
        return self._outbox.next_due(now, busy=busy)

    # -- small things ---------------------------------------------------------------------------------------------

    def _move(self, state: ConnectionState) -> None:
        assert state in CONNECTION_MOVES[self.state], f"connection: {self.state.value} -> {state.value}"
        self.state = state

    def _close(self, code: int, reason: str) -> list[Action]:
        return [*self.lost(), Close(code, reason)]

    def _notice(self, code: str, message: str, param: str | None) -> list[Action]:
        self._outbox.say(m.Error(code, message, None, param))
        return []

    def _refuse_all(
        self, ids: tuple[str, ...], code: str, message: str, param: str | None, *, retryable: bool = False
    ) -> list[Action]:
        for stream_id in ids:
            self._outbox.say(m.Error(code, message, stream_id, param, retryable))
        return []


def _ending(event: text.Finished) -> m.Done | m.Error:
    if event.error is not None:
        code, message = event.error
        return m.Error(code, message, event.id, retryable=code == "engine_lost")
    timings, score = event.timings, event.score
    perplexity = score.perplexity if score is not None else 0.0
    return m.Done(
        event.id,
        event.completion_tokens,
        event.finish_reason,
        m.Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        m.Timings(*(round(part, 6) for part in (timings.queue, timings.prefill, timings.ttft, timings.decode))),
        embedding=None if event.embedding is None else event.vector(),
        score=None if score is None else m.Score(score.logprob, score.tokens, perplexity if math.isfinite(perplexity) else None),
    )

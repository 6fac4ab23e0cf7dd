"""One connection, without its socket: frames and engine events in, messages and wishes out.

    shell                                    Session
    frame from the socket     -> receive()   -> actions: open or cancel streams, close the socket
    events from TextStreams   -> events()
    socket can take a frame   -> next_message(now), or next_due() tells when to ask again

Pull, not push: text waits here, merged per stream, until the writer asks. A slow reader therefore costs one merged delta per
stream and not a queue of frames. Time is an argument; nothing here knows a clock. Credit, resume and fork will be further
messages on the same streams.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec

from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.bodies import ParsedBody, parse_body, validation_error
from streamkv.sampling_params import TokenLogprobs
from streamkv.text import events as text

__all__ = ["Action", "CancelStream", "Close", "ConnectionState", "OpenStreams", "Session", "SessionLimits", "StreamState"]

_ID: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_MAX_BAD_FRAMES: Final = 32


class ConnectionState(Enum):
    """Where a connection is."""

    AWAIT_HELLO = "await_hello"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


CONNECTION_MOVES: Final[dict[ConnectionState, frozenset[ConnectionState]]] = {
    ConnectionState.AWAIT_HELLO: frozenset({ConnectionState.OPEN, ConnectionState.DRAINING, ConnectionState.CLOSED}),
    ConnectionState.OPEN: frozenset({ConnectionState.DRAINING, ConnectionState.CLOSED}),
    ConnectionState.DRAINING: frozenset({ConnectionState.CLOSED}),
    ConnectionState.CLOSED: frozenset(),
}


class StreamState(Enum):
    """Where a stream is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    CANCELLING = "cancelling"
    DONE = "done"


_LIVE: Final = frozenset(
    {StreamState.PREFILL, StreamState.DECODE, StreamState.PREEMPTED, StreamState.CANCELLING, StreamState.DONE}
)
STREAM_MOVES: Final[dict[StreamState, frozenset[StreamState]]] = {
    StreamState.QUEUED: _LIVE,
    StreamState.PREFILL: _LIVE,
    StreamState.DECODE: _LIVE,
    StreamState.PREEMPTED: _LIVE,
    StreamState.CANCELLING: frozenset({StreamState.DONE}),
    StreamState.DONE: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of one connection (protocol.md 3.4, 3.7).

    Attributes:
        streams: streams that may run at once; further ones wait here.
        queue: streams that may wait.
        frame: most bytes of an inbound frame.
        outbound: bytes of text that may wait for a slow reader.
        flush_tokens, flush_bytes, flush_s, flush_busy_s: after its first token a stream's text is sent at this many tokens,
            bytes or seconds, whichever comes first; the longer time counts while other frames are waiting.
        heartbeat_s: a stream that has sent nothing for this long sends its status.
    """

    streams: int = 64
    queue: int = 256
    frame: int = 1 << 20
    hello_s: float = 5.0
    outbound: int = 256 * 1024
    flush_tokens: int = 8
    flush_bytes: int = 512
    flush_s: float = 0.020
    flush_busy_s: float = 0.050
    heartbeat_s: float = 20.0


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Prepare and submit one prompt; answer with `Session.opened` or `Session.refused`."""

    ids: tuple[str, ...]
    body: ParsedBody
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


class _Stream:
    """Output of one stream that the writer has not taken yet."""

    __slots__ = ("count", "end", "first_at", "id", "logprobs", "offset", "pieces", "sent", "size", "state", "status")

    def __init__(self, stream_id: str) -> None:
        self.id = stream_id
        self.state = StreamState.QUEUED
        self.offset = 0  # tokens taken by the writer
        self.count = 0  # tokens waiting
        self.pieces: list[str] = []
        self.size = 0
        self.logprobs: list[TokenLogprobs] = []
        self.first_at = 0.0  # when the oldest waiting piece came
        self.sent = False  # the first token has gone out
        self.status: m.Status | None = None
        self.end: m.Done | m.Error | None = None

    def move(self, state: StreamState) -> None:
        assert state in STREAM_MOVES[self.state], f"stream {self.id}: {self.state.value} -> {state.value}"
        self.state = state

    def due(self, limits: SessionLimits, busy: bool) -> float:
        """When the waiting text should be sent; -inf = now."""
        if not self.sent or self.end is not None or self.count >= limits.flush_tokens or self.size >= limits.flush_bytes:
            return float("-inf")
        return self.first_at + (limits.flush_busy_s if busy else limits.flush_s)

    def take(self) -> m.Delta:
        logprobs = [_plain_logprobs(entry) for entry in self.logprobs] or None
        delta = m.Delta(self.id, self.offset, self.count, "".join(self.pieces), lp=logprobs)
        self.offset += self.count
        self.count = self.size = 0
        self.pieces.clear()
        self.logprobs.clear()
        self.sent = True
        return delta


class Session:
    """The state of one connection. Not thread-safe; one shell drives it."""

    def __init__(
        self, codec: m.Codec, limits: SessionLimits, *, session_id: str, epoch: str, server: str, models: tuple[str, ...]
    ) -> None:
        """Start waiting for `hello`."""
        self.state = ConnectionState.AWAIT_HELLO
        self._codec = codec
        self._limits = limits
        self._identity = (session_id, epoch, server)
        self._models = models
        self._control: deque[m.ServerMessage] = deque()
        self._streams: OrderedDict[str, _Stream] = OrderedDict()  # rotated: who was served goes to the end
        self._ready: OrderedDict[str, _Stream] = OrderedDict()  # streams with something to send
        self._running: set[str] = set()
        self._waiting: deque[OpenStreams] = deque()
        self._bad_frames = 0
        self.outbound_bytes = 0

    # -- in: frames -----------------------------------------------------------------------------------------------

    def receive(self, data: bytes, *, is_text: bool) -> list[Action]:
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
        return self._handle(message)

    def _handle(self, message: m.ClientMessage) -> list[Action]:
        match message:
            case m.Create():
                return self._create(message)
            case m.Cancel():
                return self._cancel(message.id)
            case m.Ping():
                self._control.append(m.Pong(message.ts, 0.0))
                return []
            case m.Bye():
                actions: list[Action] = list(self.lost())
                return [*actions, Close(1000, "bye")]
            case m.Credit():
                return self._notice("invalid_request", "credit is not available yet: streams have no limit", "max")
            case m.Resume():
                self._fail(message.id, "resume_gone", "resume is not available yet; create the stream again", "id")
                return []
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
        self._control.append(
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
            return self._close(4400, "malformed: the first frame must be hello")
        self._bad_frames += 1
        if self._bad_frames > _MAX_BAD_FRAMES:
            return self._close(1008, "too_many_bad_frames: fix the client")
        try:
            loose = self._codec.decode_any(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError):
            return self._notice("invalid_request", "the frame is malformed", None)
        invalid = validation_error(error)
        tag = loose.get("t") if isinstance(loose, dict) else None
        if not isinstance(tag, str) or not any(tag == kind.__struct_config__.tag for kind in m.ClientMessage.__args__):
            return self._notice("unknown_type", "t must name a message of the protocol", "t")
        stream_id = loose.get("id")
        if tag == "create" and isinstance(stream_id, str) and _ID.fullmatch(stream_id) and stream_id not in self._streams:
            self._control.append(m.Error("invalid_request", invalid.message, stream_id, invalid.param))
            return []
        return self._notice("invalid_request", invalid.message, invalid.param)

    # -- in: streams ----------------------------------------------------------------------------------------------

    def _create(self, message: m.Create) -> list[Action]:
        ids = tuple(message.ids) if message.ids is not None else (message.id,) if message.id is not None else ()
        if not ids or (message.ids is not None and message.id is not None):
            return self._notice("invalid_request", "give id, or ids for several samples", "id")
        if len(ids) > 16 or len(set(ids)) != len(ids) or not all(_ID.fullmatch(stream_id) for stream_id in ids):
            return self._notice("invalid_request", "1 to 16 different ids of 1 to 64 characters A-Z a-z 0-9 _ . -", "id")
        taken = next((stream_id for stream_id in ids if stream_id in self._streams), None)
        if taken is not None:
            # Without an id: with one it would read as the end of the stream that is alive under it.
            return self._notice("stream_exists", f"stream {taken} is alive; choose another id", "id")
        if self.state is ConnectionState.DRAINING:
            return self._refuse_all(ids, "draining", "the server is shutting down; connect to another one", None, retryable=True)
        if len(self._streams) + len(ids) > self._limits.streams + self._limits.queue:
            limit = self._limits.streams + self._limits.queue
            return self._refuse_all(ids, "too_many_streams", f"at most {limit} streams per connection", None, retryable=True)
        if message.max is not None and message.max != m.MAX_CREDIT:
            return self._refuse_all(ids, "invalid_request", "credit is not available yet: leave max out", "max")
        if not -(2**31) <= message.priority < 2**31:
            return self._refuse_all(ids, "invalid_request", "priority must be a 32-bit integer", "priority")
        try:
            body = parse_body(message.api, message.body, self._codec, models=self._models, num_ids=len(ids))
        except InvalidRequestError as error:
            return self._refuse_all(ids, error.code, error.message, error.param)
        for stream_id in ids:
            self._streams[stream_id] = _Stream(stream_id)
        wish = OpenStreams(ids, body, message.priority)
        if len(self._running) + len(ids) > self._limits.streams:
            self._waiting.append(wish)
            return []
        self._running.update(ids)
        return [wish]

    def _cancel(self, stream_id: str) -> list[Action]:
        """Idempotent; unknown and finished ids are ignored."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.state in (StreamState.CANCELLING, StreamState.DONE):
            return []
        if stream_id in self._running:
            stream.move(StreamState.CANCELLING)
            return [CancelStream(stream_id)]
        # Still waiting here: its siblings, if any, go on without it only once they run, so cancel the whole group's member now.
        for index, wish in enumerate(self._waiting):
            if stream_id in wish.ids:
                rest = tuple(other for other in wish.ids if other != stream_id)
                if rest:
                    self._waiting[index] = OpenStreams(rest, wish.body, wish.priority)
                else:
                    del self._waiting[index]
                break
        self._finish(stream, m.Done(stream_id, 0, "cancelled", m.Usage(0, 0, 0), m.Timings(0.0, 0.0, 0.0, 0.0)))
        return []

    def opened(self, ids: tuple[str, ...], rid: str, prompt_tokens: int) -> list[Action]:
        """The engine has taken these. Returns cancels of those that were cancelled meanwhile."""
        cancels: list[Action] = []
        for stream_id in ids:
            stream = self._streams.get(stream_id)
            if stream is None:
                cancels.append(CancelStream(stream_id))
                continue
            self._control.append(m.Accepted(stream_id, f"{rid}.{stream_id}", prompt_tokens))
            if stream.state is StreamState.CANCELLING:
                cancels.append(CancelStream(stream_id))
        return cancels

    def refused(self, ids: tuple[str, ...], error: StreamKVError) -> list[Action]:
        """The engine cannot take these. Returns what may start in their place."""
        param = error.param
        if param in ("prompt", "messages", "stop_token_ids", "max_tokens"):
            param = f"body.{param}"
        for stream_id in ids:
            stream = self._streams.get(stream_id)
            if stream is not None:
                self._finish(stream, m.Error(error.code, error.message, stream_id, param, error.retryable))
        return self.start_waiting()

    def events(self, events: list[text.StreamEvent], now: float) -> list[Action]:
        """What a step produced for streams of this connection. Returns what may start now."""
        ended = False
        for event in events:
            stream = self._streams.get(event.id)
            if stream is None or stream.end is not None:
                continue
            if isinstance(event, text.Delta):
                if not stream.count and not stream.pieces:
                    stream.first_at = now
                stream.count += event.count
                stream.pieces.append(event.text)
                size = len(event.text.encode())
                stream.size += size
                self.outbound_bytes += size
                if event.logprobs is not None:
                    stream.logprobs.extend(event.logprobs)
            elif isinstance(event, text.Status):
                if stream.state is not StreamState.CANCELLING:
                    stream.move(StreamState(event.state))
                    stream.status = m.Status(event.id, event.state, event.cached)
            else:
                self._finish(stream, _ending(event))
                ended = True
            self._ready[event.id] = stream
        return self.start_waiting() if ended else []

    def start_waiting(self) -> list[Action]:
        """Streams that waited for a place among the running ones."""
        actions: list[Action] = []
        while self._waiting and len(self._running) + len(self._waiting[0].ids) <= self._limits.streams:
            wish = self._waiting.popleft()
            self._running.update(wish.ids)
            actions.append(wish)
        return actions

    def _finish(self, stream: _Stream, end: m.Done | m.Error) -> None:
        if stream.end is None:
            stream.move(StreamState.DONE)
            stream.end = end
            self._running.discard(stream.id)
            self._ready[stream.id] = stream

    # -- in: the server -------------------------------------------------------------------------------------------

    def drain(self, deadline_ms: int, reason: str) -> None:
        """Take no new streams; those that run may finish."""
        if self.state in (ConnectionState.OPEN, ConnectionState.AWAIT_HELLO):
            self._move(ConnectionState.DRAINING)
            self._control.append(m.Drain(deadline_ms, reason))

    def lost(self) -> list[CancelStream]:
        """The connection is gone or says bye: nothing is sent any more; these must be cancelled."""
        if self.state is ConnectionState.CLOSED:
            return []
        self._move(ConnectionState.CLOSED)
        running = sorted(self._running)
        self._waiting.clear()
        self._streams.clear()
        self._ready.clear()
        self._running.clear()
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
        return self.outbound_bytes > self._limits.outbound

    # -- out ------------------------------------------------------------------------------------------------------

    def next_message(self, now: float, *, busy: bool = False) -> m.ServerMessage | None:
        """The next message to send, or None if none is due. Control first, then the streams in turn.

        Args:
            busy: other output is waiting in the socket: text may be merged a little longer.
        """
        if self._control:
            message = self._control.popleft()
            return msgspec.structs.replace(message, now=now) if isinstance(message, m.Pong) else message
        for stream_id, stream in self._ready.items():
            if stream.status is not None:
                status, stream.status = stream.status, None
                return status
            if (stream.count or stream.size) and stream.due(self._limits, busy) <= now:
                self.outbound_bytes -= stream.size
                delta = stream.take()
                self._ready.move_to_end(stream_id)  # the others first
                if stream.end is None:
                    del self._ready[stream_id]
                return delta
            if stream.end is not None:
                del self._ready[stream_id], self._streams[stream_id]
                return stream.end
        return None

    def next_due(self, now: float, *, busy: bool = False) -> float | None:
        """Seconds until `next_message` has something, 0 = now; None = not before something comes in."""
        if self._control:
            return 0.0
        waits = [
            float("-inf") if stream.status is not None or stream.end is not None else stream.due(self._limits, busy)
            for stream in self._ready.values()
        ]
        return max(0.0, min(waits) - now) if waits else None

    # -- small things ---------------------------------------------------------------------------------------------

    def _move(self, state: ConnectionState) -> None:
        assert state in CONNECTION_MOVES[self.state], f"connection: {self.state.value} -> {state.value}"
        self.state = state

    def _close(self, code: int, reason: str) -> list[Action]:
        return [*self.lost(), Close(code, reason)]

    def _notice(self, code: str, message: str, param: str | None) -> list[Action]:
        self._control.append(m.Error(code, message, None, param))
        return []

    def _fail(self, stream_id: str, code: str, message: str, param: str | None) -> None:
        self._control.append(m.Error(code, message, stream_id, param))

    def _refuse_all(
        self, ids: tuple[str, ...], code: str, message: str, param: str | None, *, retryable: bool = False
    ) -> list[Action]:
        for stream_id in ids:
            self._control.append(m.Error(code, message, stream_id, param, retryable))
        return []


def _ending(event: text.Finished) -> m.Done | m.Error:
    if event.error is not None:
        code, message = event.error
        return m.Error(code, message, event.id, retryable=code == "engine_lost")
    timings = event.timings
    return m.Done(
        event.id,
        event.completion_tokens,
        event.finish_reason,
        m.Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        m.Timings(*(round(part, 6) for part in (timings.queue, timings.prefill, timings.ttft, timings.decode))),
    )


def _plain_logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    return {"chosen": entry.chosen, "top": [[token, value] for token, value in entry.top]}

"""What waits to be sent on one connection. Pull, not push: text waits here, merged per stream, until the writer asks.

A slow reader therefore costs one merged delta per stream and not a queue of frames; and what its own frames are answered with
is bounded, because they are not read while `crowded`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

import msgspec

from streamkv.protocol import messages as m
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs
from streamkv.text import events as text

__all__ = ["STREAM_MOVES", "OutStream", "Outbox", "SessionLimits", "StreamState"]

_LOGPROB_BYTES: Final = 24  # of one (token id, value), as JSON
_PROMPT_ENTRIES: Final = 64
"""Prompt tokens in one frame, so that one stream's scores do not hold up the others' text."""


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
    """Bounds of one connection (docs/protocol.md, "Limits").

    Attributes:
        streams: streams that may run at once; further ones wait here.
        queue: streams that may wait.
        frame: most bytes of an inbound frame.
        outbound: bytes of text that may wait for a slow reader.
        control: answers to the client's own frames that may wait; beyond, its frames are not read.
        flush_tokens, flush_bytes, flush_s, flush_busy_s: after its first token a stream's text is sent at this many tokens,
            bytes or seconds, whichever comes first; the longer time counts while other frames are waiting.
        heartbeat_s: a stream that has sent nothing for this long sends its status.
    """

    streams: int = 64
    queue: int = 256
    frame: int = 1 << 20
    hello_s: float = 5.0
    outbound: int = 256 * 1024
    control: int = 256
    flush_tokens: int = 8
    flush_bytes: int = 512
    flush_s: float = 0.020
    flush_busy_s: float = 0.050
    heartbeat_s: float = 20.0


class OutStream:
    """One stream and its output that the writer has not taken yet."""

    __slots__ = (
        "count",
        "end",
        "first_at",
        "id",
        "logprobs",
        "offset",
        "opened",
        "pieces",
        "prompt",
        "said_at",
        "sent",
        "size",
        "state",
        "status",
        "told",
        "weight",
    )

    def __init__(self, stream_id: str, now: float) -> None:
        self.id = stream_id
        self.state = StreamState.QUEUED
        self.opened = False  # `accepted` is on its way; before, nothing of the stream is sent
        self.offset = 0  # tokens taken by the writer
        self.count = 0  # tokens waiting
        self.pieces: list[str] = []
        self.size = 0  # bytes of text waiting
        self.weight = 0  # bytes of everything waiting
        self.logprobs: list[TokenLogprobs] = []
        self.prompt: deque[m.Prompt] = deque()  # log-probabilities of the prompt, sent before any text
        self.first_at = 0.0  # when the oldest waiting piece came
        self.said_at = now  # when the writer last took something
        self.sent = False  # the first token has gone out
        self.told: Literal["queued", "prefill", "decode", "preempted"] = "queued"  # the state that the client knows
        self.status: m.Status | None = None
        self.end: m.Done | m.Error | None = None

    def move(self, state: StreamState) -> None:
        """The only way to change the state."""
        assert state in STREAM_MOVES[self.state], f"stream {self.id}: {self.state.value} -> {state.value}"
        self.state = state

    def due(self, limits: SessionLimits, busy: bool) -> float:
        """When what waits should be sent; -inf = now."""
        if self.status is not None or self.end is not None or self.prompt or not self.sent:
            return float("-inf")
        if self.count >= limits.flush_tokens or self.size >= limits.flush_bytes:
            return float("-inf")
        return self.first_at + (limits.flush_busy_s if busy else limits.flush_s)

    @property
    def has_text(self) -> bool:
        """True if a delta waits."""
        return bool(self.count or self.pieces)

    @property
    def has_output(self) -> bool:
        """True if anything waits."""
        return self.has_text or bool(self.prompt) or self.status is not None or self.end is not None

    def take(self) -> m.Delta:
        """All text that waits, as one delta."""
        logprobs = [_plain_logprobs(entry) for entry in self.logprobs] or None
        delta = m.Delta(self.id, self.offset, self.count, "".join(self.pieces), lp=logprobs)
        self.offset += self.count
        self.count = self.size = self.weight = 0
        self.pieces.clear()
        self.logprobs.clear()
        self.sent = True
        return delta


class Outbox:
    """Everything that one connection has to say, in the order in which it will be said."""

    def __init__(self, limits: SessionLimits) -> None:
        self.streams: OrderedDict[str, OutStream] = OrderedDict()  # without their last frame; longest silent first
        self.bytes = 0  # of text that waits
        self._limits = limits
        self._control: deque[m.ServerMessage] = deque()
        self._ready: OrderedDict[str, OutStream] = OrderedDict()  # streams with output; served in turn

    # -- in -------------------------------------------------------------------------------------------------------

    def say(self, message: m.ServerMessage) -> None:
        """Queue a message that comes before all text."""
        self._control.append(message)

    def open(self, stream: OutStream, accepted: m.Accepted) -> None:
        """The stream's output may be sent, `accepted` first."""
        stream.opened = True
        self.say(accepted)
        if stream.has_output:
            self._ready[stream.id] = stream

    def text(self, stream: OutStream, event: text.Delta, now: float) -> None:
        """Add to what waits."""
        if not stream.has_text:
            stream.first_at = now
        size = len(event.text.encode())
        # An echoed prompt is what the client has sent itself, in one frame: that it waits does not make the client slow.
        weight = size if event.count or stream.offset or stream.count else 0
        if event.logprobs is not None:
            stream.logprobs.extend(event.logprobs)
            weight += _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in event.logprobs)
        stream.count += event.count
        stream.pieces.append(event.text)
        stream.size += size
        stream.weight += weight
        self.bytes += weight
        self._changed(stream)

    def prompt(self, stream: OutStream, logprobs: PromptLogprobs) -> None:
        """Say what is known of the prompt, in frames of bounded size. Not weighed: bounded when the request was taken."""
        for index in range(0, len(logprobs.entries), _PROMPT_ENTRIES):
            part = [_plain_logprobs(entry) for entry in logprobs.entries[index : index + _PROMPT_ENTRIES]]
            stream.prompt.append(m.Prompt(stream.id, logprobs.start + index, part))
        self._changed(stream)

    def status(self, stream: OutStream, status: m.Status) -> None:
        """Tell a state; of several that wait only the last is told."""
        if status.cached is None and stream.status is not None:
            status = msgspec.structs.replace(status, cached=stream.status.cached)
        stream.status = status
        self._changed(stream)

    def end(self, stream: OutStream, end: m.Done | m.Error, *, unopened: bool = False) -> None:
        """Say this last; `unopened`: also of a stream that has not been accepted and never will be."""
        stream.opened = stream.opened or unopened
        stream.end = end
        self._changed(stream)

    def _changed(self, stream: OutStream) -> None:
        if stream.opened:
            self._ready[stream.id] = stream

    def clear(self) -> None:
        """Forget all streams; what answers the client's own frames stays."""
        self.streams.clear()
        self._ready.clear()
        self.bytes = 0

    # -- out ------------------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """True if the client must first take the answers to its earlier frames."""
        return len(self._control) >= self._limits.control

    def next_message(self, now: float, *, busy: bool) -> m.ServerMessage | None:
        """The next message to send, or None if none is due. Control first, then the streams in turn, then signs of life."""
        if self._control:
            message = self._control.popleft()
            return msgspec.structs.replace(message, now=now) if isinstance(message, m.Pong) else message
        for stream in self._ready.values():
            if stream.due(self._limits, busy) <= now:
                return self._take(stream, now)
        return self._sign_of_life(now)

    def next_due(self, now: float, *, busy: bool) -> float | None:
        """Seconds until `next_message` has something, 0 = now; None = not before something comes in."""
        if self._control:
            return 0.0
        waits = [stream.due(self._limits, busy) for stream in self._ready.values()]
        if self.streams:
            waits.append(next(iter(self.streams.values())).said_at + self._limits.heartbeat_s)
        return max(0.0, min(waits) - now) if waits else None

    def _take(self, stream: OutStream, now: float) -> m.ServerMessage:
        self._spoke(stream, now)
        message: m.Status | m.Prompt | m.Delta
        if stream.status is not None:
            message, stream.status = stream.status, None
            stream.told = message.state
        elif stream.prompt:
            message = stream.prompt.popleft()
        elif stream.has_text:
            self.bytes -= stream.weight
            message = stream.take()
        else:
            assert stream.end is not None
            del self.streams[stream.id], self._ready[stream.id]
            return stream.end
        if not stream.has_output:
            del self._ready[stream.id]
        return message

    def _sign_of_life(self, now: float) -> m.Status | None:
        stream = next(iter(self.streams.values()), None)
        if stream is None or stream.said_at + self._limits.heartbeat_s > now:
            return None
        self._spoke(stream, now)
        return m.Status(stream.id, stream.told)

    def _spoke(self, stream: OutStream, now: float) -> None:
        stream.said_at = now
        self.streams.move_to_end(stream.id)


def _plain_logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    return {"chosen": entry.chosen, "rank": entry.rank, "top": [[token, value] for token, value in entry.top]}

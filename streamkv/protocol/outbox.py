"""What waits to be sent on one connection. Pull, not push: text waits here, merged per stream, until the writer asks.

A slow reader therefore costs one merged delta per stream and not a queue of frames; and what its own frames are answered with
is bounded, because they are not read while `crowded`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec

from streamkv.protocol import messages as m
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outstream import OutStream, plain_logprobs
from streamkv.sampling_params import PromptLogprobs
from streamkv.text import events as text

__all__ = ["Outbox"]

_LOGPROB_BYTES: Final = 24  # of one (token id, value), as JSON
_PROMPT_ENTRIES: Final = 64
"""Prompt tokens in one frame, so that one stream's scores do not hold up the others' text."""
_AWAY_TOKENS: Final = 64
"""Tokens in one chunk of a stream without a connection, for the same reason."""


class Outbox:
    """Everything that one connection has to say, in the order in which it will be said."""

    __slots__ = ("_control", "_limits", "_ready", "bytes", "streams")

    def __init__(self, limits: SessionLimits) -> None:
        self.streams: OrderedDict[str, OutStream] = OrderedDict()  # attached, without their last frame; longest silent first
        self.bytes = 0  # of text that waits in them
        self._limits = limits
        self._control: list[m.ServerMessage] = []  # short: bounded by `crowded`; an empty deque takes half a kilobyte
        self._ready: OrderedDict[str, OutStream] = OrderedDict()  # of them those with output; served in turn

    # -- in -------------------------------------------------------------------------------------------------------

    def say(self, message: m.ServerMessage) -> None:
        """Queue a message that comes before all text."""
        self._control.append(message)

    def attach(self, stream: OutStream, now: float) -> None:
        """Its output goes to this connection."""
        stream.attached = True
        if stream.id not in self.streams:
            self.streams[stream.id] = stream
            self.bytes += stream.weight
        self._spoke(stream, now)
        self._changed(stream)

    def open(self, stream: OutStream, accepted: m.Accepted) -> None:
        """The stream's output may be sent, `accepted` first."""
        stream.opened = True
        if stream.attached:
            self.say(accepted)
        self._changed(stream)

    def text(self, stream: OutStream, event: text.Delta, now: float) -> None:
        """Add to what waits."""
        if not stream.count:
            stream.first_at = now
        size = len(event.text.encode())
        # An echoed prompt is what the client has sent itself, in one frame: that it waits does not make the client slow.
        is_echo = not event.count and stream.num_tokens == stream.base
        weight = 0 if is_echo else size
        stream.chars -= len(event.text) if is_echo else 0
        if event.logprobs is not None:
            stream.logprobs.extend(event.logprobs)
            weight += _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in event.logprobs)
        stream.count += event.count
        if event.text:
            stream.pieces.append(event.text)
        stream.output.extend(event.token_ids)
        stream.size += size
        stream.weight += weight
        if stream.attached:
            self.bytes += weight
        elif stream.count >= _AWAY_TOKENS:
            stream.take()
        self._changed(stream)

    def prompt(self, stream: OutStream, logprobs: PromptLogprobs) -> None:
        """Say what is known of the prompt, in frames of bounded size. Not weighed: bounded when the request was taken."""
        for index in range(0, len(logprobs.entries), _PROMPT_ENTRIES):
            part = [plain_logprobs(entry) for entry in logprobs.entries[index : index + _PROMPT_ENTRIES]]
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
        if stream.opened and stream.attached and stream.has_output:
            self._ready[stream.id] = stream

    def forget(self, stream: OutStream) -> None:
        """Nothing more is said of it."""
        if self.streams.get(stream.id) is stream:
            del self.streams[stream.id]
            self._ready.pop(stream.id, None)
            self.bytes -= stream.weight

    def clear(self, *, keep_control: bool = False) -> None:
        """The connection is gone, or nothing of its streams is to be sent any more."""
        self.streams.clear()
        self._ready.clear()
        self.bytes = 0
        if not keep_control:
            self._control.clear()

    # -- out ------------------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """True if the client must first take the answers to its earlier frames."""
        return len(self._control) >= self._limits.control

    def next_message(self, now: float, *, busy: bool) -> m.ServerMessage | None:
        """The next message to send, or None if none is due. Control first, then the streams in turn, then signs of life."""
        if self._control:
            message = self._control.pop(0)
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
        """In this order: state, prompt, what is sent again, new text, the end."""
        self._spoke(stream, now)
        message: m.Status | m.Prompt | m.Delta
        if stream.status is not None:
            message, stream.status = stream.status, None
            stream.told = message.state
        elif stream.prompt:
            message = stream.prompt.popleft()
            stream.said_of_prompt.append(message)
        elif stream.replay:
            message = stream.replay.popleft()
            if not stream.replay:
                stream.ring.shrink(self._limits.ring)  # its last chunk was perhaps cut only now
        elif stream.has_text:
            self.bytes -= stream.weight
            message = stream.take()
            stream.ring.shrink(self._limits.ring)
        else:
            assert stream.end is not None
            self.forget(stream)
            return stream.end
        if stream.has_output:
            self._ready.move_to_end(stream.id)
        else:
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

"""A client's streams, without sockets: frames and engine events in, messages and wishes out. It outlives its connection.

    shell                                      Session
    a connection has said hello   -> attach()  -> `welcome`
    frame from the socket         -> receive() -> actions: open, fork, grant to, or cancel streams; close the socket
    events from TextStreams       -> events()
    socket can take a frame       -> next_message(now), or next_due() tells when to ask again
    the connection is gone        -> detach()  -> its streams go on within their credit, and may be resumed
    time has passed               -> tick()    -> what nobody came back for is ended

Time is an argument; nothing here knows a clock. Which streams there are is `StreamTable`'s to know, what a client's messages do
to them is `ClientSide`'s, what the engine says of them `EngineSide`'s; here is the connection.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, Final

from streamkv.errors import StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, Close
from streamkv.protocol.client_side import ClientSide
from streamkv.protocol.engine_side import EngineSide
from streamkv.protocol.frames import Malformed, read_message
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outbox import Outbox
from streamkv.protocol.requests import Served
from streamkv.protocol.stream_table import StreamTable
from streamkv.text import events as text

__all__ = ["SESSION_MOVES", "Session", "SessionState"]

_MAX_BAD_FRAMES: Final = 32


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


class Session:
    """The streams of one client. Not thread-safe; one shell drives it."""

    __slots__ = (
        "_bad_frames",
        "_client",
        "_codec",
        "_engine",
        "_epoch",
        "_limits",
        "_models",
        "_outbox",
        "_server",
        "_table",
        "id",
        "state",
    )

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
        self._outbox = Outbox(limits)
        self._table = StreamTable(limits, self._outbox)
        self._client = ClientSide(self._table, Served(models, max_model_len), epoch)
        self._engine = EngineSide(self._table)
        self._bad_frames = 0
        self._welcome(resumed=False)

    # -- connections come and go ----------------------------------------------------------------------------------

    def attach(self, codec: m.Codec, now: float) -> None:
        """A new connection has named this session; its streams wait until it resumes them."""
        assert self.state is SessionState.DETACHED, "detach the old connection first"
        self._codec = codec
        self._bad_frames = 0
        self._move(SessionState.OPEN)
        self._welcome(resumed=True)

    def detach(self, now: float) -> list[Action]:
        """The connection is gone: streams that are to live on do, the others must be cancelled."""
        if self.state in (SessionState.DETACHED, SessionState.CLOSED):
            return []
        self._move(SessionState.DETACHED)
        self._outbox.clear()
        actions: list[Action] = []
        for stream in list(self._table.alive.values()):
            stream.attached = False
            stream.replay.clear()
            if stream.keeps:
                stream.since = now
            else:
                actions += self._table.give_up(stream)
        return [*actions, *self._table.start_waiting(), *self._closed_if_empty()]

    def close(self) -> list[Action]:
        """Everything ends, nothing is sent any more; these must be cancelled."""
        if self.state is SessionState.CLOSED:
            return []
        self._move(SessionState.CLOSED)
        return list(self._table.clear())

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

    def _closed_if_empty(self) -> list[Action]:
        """A session that nobody can come back to for anything is over."""
        if self.state is SessionState.DETACHED and not self._table.alive and not self._table.retained:
            return self.close()
        return []

    def _move(self, state: SessionState) -> None:
        assert state in SESSION_MOVES[self.state], f"session: {self.state.value} -> {state.value}"
        self.state = state

    # -- in: frames -----------------------------------------------------------------------------------------------

    def receive(self, data: bytes, *, is_text: bool, now: float) -> list[Action]:
        """One frame from the client, after its hello."""
        if not self.attached:
            return []
        message = read_message(self._codec, data, is_text=is_text)
        match message:
            case m.Create() | m.Fork():
                return self._client.begin(message, self._codec, now, draining=self.state is SessionState.DRAINING)
            case m.Credit():
                return self._client.credit(message)
            case m.Cancel():
                return self._client.cancel(message.id, now)
            case m.Resume():
                return self._client.resume(message, now)
            case m.Ping():
                if not math.isfinite(message.ts):
                    return self._client.notice("invalid_request", "ts must be a finite number", "ts")
                self._outbox.say(m.Pong(message.ts, 0.0))
                return []
            case m.Bye():
                goodbye = self.close() if message.cancel else self.detach(now)
                return [*goodbye, Close(1000, "bye")]
            case m.Hello():
                return self._break_off(Close(4400, "second_hello: hello is sent once"))
            case Malformed():
                return self._malformed(message)
            case Close():
                return self._break_off(message)

    def _break_off(self, close: Close) -> list[Action]:
        """A client that breaks the protocol has nothing to come back for."""
        return [*self.close(), close]

    def _malformed(self, frame: Malformed) -> list[Action]:
        """Tell it, keep the connection and its streams."""
        self._bad_frames += 1
        if self._bad_frames > _MAX_BAD_FRAMES:
            return self._break_off(Close(1008, "too_many_bad_frames: fix the client"))
        if frame.ids and not any(stream_id in self._table.alive for stream_id in frame.ids):
            return self._client.refuse(frame.ids, frame.code, frame.message, frame.param)
        return self._client.notice(frame.code, frame.message, frame.param)

    # -- in: the engine -------------------------------------------------------------------------------------------

    def wants(self, keys: tuple[str, ...]) -> bool:
        """False if all of these have been given up, so that nothing need be submitted."""
        return any(key in self._table.in_engine for key in keys)

    def opened(self, key: str, rid: str, prompt_tokens: int, record: Any = None, *, now: float) -> list[Action]:
        """The engine has taken this one.

        Args:
            rid: its name in the log.
            record: what a fork of it will need.

        Returns:
            What must be told to the engine now.
        """
        return self._engine.opened(key, rid, prompt_tokens, record, now)

    def refused(self, keys: tuple[str, ...], error: StreamKVError, now: float) -> list[Action]:
        """The engine cannot take these. Returns what may start in their place."""
        return self._engine.refused(keys, error, now)

    def events(self, events: list[text.StreamEvent], now: float) -> list[Action]:
        """What a step produced, by key. Returns what may start now, and what nobody will ever read."""
        return self._engine.events(events, now)

    # -- time and memory ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """End what has waited for too long, forget what nobody came back for."""
        return [*self._table.tick(now), *self._closed_if_empty()]

    def next_tick(self) -> float:
        """When `tick` has something to do; inf = not before something happens."""
        return self._table.next_tick()

    def shrink(self) -> int:
        """Forget the oldest finished stream; the bytes that this gives back, 0 if there is none."""
        return self._table.shrink()

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
        return len(self._table.alive)

    @property
    def num_replayed(self) -> int:
        """Tokens sent once more after resumes."""
        return self._client.num_replayed

    @property
    def retained_bytes(self) -> int:
        """Memory of its streams, roughly."""
        return self._table.bytes

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
            self._table.retain(message, now)
        return message

    def next_due(self, now: float, *, busy: bool = False) -> float | None:
        """Seconds until `next_message` has something, 0 = now; None = not before something comes in."""
        return self._outbox.next_due(now, busy=busy)

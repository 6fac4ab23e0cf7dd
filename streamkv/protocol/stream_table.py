"""The streams of one session: who waits, who runs, who has ended and is kept. And when each of them must go.

    waiting ── a place is free ──> running ── last event ──> ended ── last frame taken ──> retained ──> forgotten
       └────────────────── given up: nobody will ever read it ──────────────────────────────────────────────┘

    alive      by id    their last frame has not been taken by a writer: the first three of these
    in_engine  by key   the engine has still something to say of them; some may have been cancelled already
    retained   by id    their last frame has been taken and may be asked for again; oldest first

What the streams say waits in the outbox; nothing else is told to anybody from here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

import msgspec

from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, OpenStreams
from streamkv.protocol.bodies import ParsedBody
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outbox import Outbox
from streamkv.protocol.outstream import OutStream, StreamState

__all__ = ["StreamTable"]


class StreamTable:
    """Owner of the streams. Its parts are read by everybody in the session, and changed here only."""

    __slots__ = ("_next_key", "alive", "in_engine", "kept_bytes", "limits", "outbox", "retained", "running", "waiting")

    def __init__(self, limits: SessionLimits, outbox: Outbox) -> None:
        self.limits = limits
        self.outbox = outbox
        self.alive: dict[str, OutStream] = {}
        self.in_engine: dict[str, OutStream] = {}
        self.retained: OrderedDict[str, OutStream] = OrderedDict()
        self.kept_bytes = 0  # of those
        self.running: set[str] = set()  # keys
        self.waiting: list[OpenStreams] = []  # not a deque, which takes half a kilobyte of every idle session
        self._next_key = 0

    def find(self, stream_id: str) -> OutStream | None:
        """Whoever has this name, alive or retained."""
        return self.alive.get(stream_id) or self.retained.get(stream_id)

    @property
    def bytes(self) -> int:
        """Memory of all of them, roughly."""
        return self.kept_bytes + sum(stream.bytes for stream in self.alive.values())

    # -- the way in -----------------------------------------------------------------------------------------------

    def new(self, stream_id: str, now: float, *, base: int, credit: int | None, keeps: bool) -> OutStream:
        """A stream of that name, which has a new life if a finished one had it."""
        self.drop(stream_id)
        key = f"{stream_id}#{self._next_key}"
        self._next_key += 1
        stream = OutStream(stream_id, now, key=key, base=base, credit=credit, keeps=keeps)
        self.alive[stream_id] = self.in_engine[key] = stream
        self.outbox.attach(stream, now)
        return stream

    def start(self, wish: OpenStreams) -> list[Action]:
        """Queue new streams, and start what may."""
        self.waiting.append(wish)
        return self.start_waiting()

    def start_waiting(self) -> list[Action]:
        """Streams that waited for a place among the running ones; nobody passes the first."""
        actions: list[Action] = []
        while self.waiting and len(self.running) + len(self.waiting[0].keys) <= self.limits.streams:
            wish = self.waiting.pop(0)
            self.running.update(wish.keys)
            actions.append(wish)
        return actions

    def leave_queue(self, key: str) -> None:
        """It waits no longer; its siblings, if any, wait on without it."""
        position, wish = next((position, wish) for position, wish in enumerate(self.waiting) if key in wish.keys)
        rest = tuple(other for other in wish.keys if other != key)
        if rest:
            body = wish.body
            if not isinstance(body, ParsedBody):  # one input per stream
                inputs = tuple(given for other, given in zip(wish.keys, body.inputs, strict=True) if other != key)
                body = msgspec.structs.replace(body, inputs=inputs)
            self.waiting[position] = replace(wish, keys=rest, body=body)
        else:
            del self.waiting[position]

    # -- the way out ----------------------------------------------------------------------------------------------

    def finish(self, stream: OutStream, end: m.Done | m.Error, now: float, *, unopened: bool = False) -> None:
        """Say this last; `unopened`: also of a stream that the engine has not taken and never will."""
        if stream.end is None:
            stream.move(StreamState.DONE)
            self.running.discard(stream.key)
            if stream.opened or unopened:
                self.in_engine.pop(stream.key, None)
            stream.since = now
            self.outbox.end(stream, end, unopened=unopened)

    def retain(self, last: m.Done | m.Error, now: float) -> None:
        """The last frame is on its way and may be lost with the connection: keep what could be asked for again."""
        assert last.id is not None
        stream = self.alive.get(last.id)
        if stream is None or stream.end is not last:
            return  # an error for an id that never lived
        del self.alive[last.id]
        if stream.keeps:
            stream.attached = False
            stream.since = now
            stream.settle()
            stream.kept = stream.bytes
            self.retained[last.id] = stream
            self.kept_bytes += stream.kept
            while self.kept_bytes > self.limits.retained:
                self.drop(next(iter(self.retained)))

    def revive(self, stream: OutStream) -> None:
        """It has been asked for again."""
        if self.drop(stream.id):
            self.alive[stream.id] = stream

    def drop(self, stream_id: str) -> bool:
        """Forget a retained stream; False if there is none of that name."""
        stream = self.retained.pop(stream_id, None)
        if stream is None:
            return False
        self.kept_bytes -= stream.kept
        return True

    def shrink(self) -> int:
        """Forget the oldest retained stream; the bytes that this gives back, 0 if there is none."""
        before = self.kept_bytes
        if self.retained:
            self.drop(next(iter(self.retained)))
        return before - self.kept_bytes

    def give_up(self, stream: OutStream) -> list[Action]:
        """Nobody will read it: forget it, and let the engine do so."""
        self.outbox.forget(stream)
        if self.drop(stream.id):
            return []
        del self.alive[stream.id]
        self.in_engine.pop(stream.key, None)
        if stream.key in self.running:
            self.running.discard(stream.key)
            return [CancelStream(stream.key)]
        if stream.end is None:
            self.leave_queue(stream.key)
        return []

    def clear(self) -> list[CancelStream]:
        """Forget everything; these must be cancelled."""
        running = sorted(self.running)
        self.waiting.clear()
        self.running.clear()
        self.alive.clear()
        self.in_engine.clear()
        self.retained.clear()
        self.kept_bytes = 0
        self.outbox.clear(keep_control=True)
        return [CancelStream(key) for key in running]

    # -- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """End what has waited for too long, forget what nobody came back for."""
        actions: list[Action] = []
        for stream in list(self.alive.values()):
            if self._deadline(stream) > now:
                continue
            if stream.attached:
                actions += self._end_stalled(stream, now)
            else:
                actions += self.give_up(stream)
        while self.retained and self._first_forgotten() <= now:
            self.drop(next(iter(self.retained)))
        return [*actions, *self.start_waiting()]

    def next_tick(self) -> float:
        """When `tick` has something to do; inf = not before something happens."""
        times = [self._deadline(stream) for stream in self.alive.values()]
        if self.retained:
            times.append(self._first_forgotten())
        return min(times, default=math.inf)

    def _first_forgotten(self) -> float:
        """When the oldest retained one may go."""
        return next(iter(self.retained.values())).since + self.limits.resume_s

    def _deadline(self, stream: OutStream) -> float:
        """When a living stream's next time limit ends."""
        if not stream.attached:
            return stream.since + (self.limits.resume_s if stream.end is not None else self.limits.grace_s)
        return stream.since + self.limits.stall_s if stream.state is StreamState.STALLED else math.inf

    def _end_stalled(self, stream: OutStream, now: float) -> list[Action]:
        message = f"no credit for {self.limits.stall_s:g} seconds; grant some, or cancel what is not read"
        self.finish(stream, m.Error("stalled_timeout", message, stream.id, retryable=True), now)
        return [CancelStream(stream.key)]

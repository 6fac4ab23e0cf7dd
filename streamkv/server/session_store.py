"""All sessions of one process: found again by their secret, bounded in number and memory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from streamkv import __version__
from streamkv.observe.recorder import NullRecorder
from streamkv.protocol import messages as m
from streamkv.protocol.session import Session
from streamkv.server.admission import Admission
from streamkv.server.config import ServerConfig
from streamkv.server.live_session import LiveSession, Peer
from streamkv.server.principal import Principal
from streamkv.text.streams import TextStreams

__all__ = ["SessionStore"]

_MAX_RETAINED: Final = 64 << 20
"""Bytes that all sessions together may keep for resumes and forks."""
_BALANCE_S: Final = 1.0

log = structlog.get_logger(__name__)


class SessionStore:
    """Makes sessions and gives them back to whoever knows their name."""

    def __init__(
        self,
        streams: TextStreams,
        config: ServerConfig,
        still_valid: Callable[[Principal], bool],
        admission: Admission,
        moved: Callable[[], None],
        recorder: NullRecorder,
    ) -> None:
        """``moved`` is called whenever a stream or a session has ended."""
        self._streams = streams
        self._config = config
        self._still_valid = still_valid
        self._admission = admission
        self._moved = moved
        self._recorder = recorder
        self._sessions: dict[str, LiveSession] = {}
        self._balance_at = 0.0

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(tuple(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, hello: m.Hello, codec: m.Codec, principal: Principal, peer: Peer, now: float) -> LiveSession:
        """The session that `hello` names, if it lives and is this tenant's; else a new one. `peer` is attached to it."""
        live = self._sessions.get(hello.session or "")
        epoch = self._streams.info.epoch
        if live is None or live.principal.tenant != principal.tenant or hello.epoch not in (None, epoch):
            return self._new(codec, principal, peer, now)
        if live.peer is not None:
            # The newest connection wins: the old one may be dead without knowing.
            taken, name = live.peer, peer.name
            live.detach(taken)
            taken.close(4409, f"taken_over: the session goes on in connection {name}")
            if live.session.closed:
                return self._new(codec, principal, peer, now)
        live.principal = principal
        live.session.attach(codec, now)
        live.peer = peer
        log.info("session_resumed", session=live.name, connection=peer.name)
        return live

    def _new(self, codec: m.Codec, principal: Principal, peer: Peer, now: float) -> LiveSession:
        info = self._streams.info
        session = Session(
            codec,
            self._config.limits,
            session_id=secrets.token_urlsafe(16),
            epoch=info.epoch,
            server=f"streamkv/{__version__}",
            models=(info.model,),
            max_model_len=info.max_model_len,
            now=now,
        )
        live = LiveSession(
            peer.name,
            session,
            self._streams,
            principal,
            self._admission,
            still_valid=self._still_valid,
            on_idle=self._ended_something,
            on_closed=self._closed,
            on_orphans=self._recorder.orphaned,
        )
        live.peer = peer
        self._sessions[session.id] = live
        return live

    def _closed(self, live: LiveSession) -> None:
        self._sessions.pop(live.session.id, None)

    def _ended_something(self) -> None:
        self._moved()
        now = time.monotonic()
        if now >= self._balance_at:
            self._balance_at = now + _BALANCE_S
            self.balance()

    def recheck(self) -> None:
        """End the sessions of keys that are not valid any more."""
        for live in self:
            if not self._still_valid(live.principal):
                if live.peer is not None:
                    live.peer.close(4401, "revoked: this key is no longer valid")
                live.close()

    def balance(self) -> None:
        """Forget the oldest finished streams while all sessions together keep too much."""
        total = sum(live.session.retained_bytes for live in self._sessions.values())
        for live in tuple(self._sessions.values()):
            while total > _MAX_RETAINED and (freed := live.session.shrink()):
                total -= freed

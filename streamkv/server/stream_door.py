"""`GET /v1/stream`: the upgrade, and the connections that came of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import structlog
from aiohttp import web

from streamkv.observe.recorder import Recorder
from streamkv.protocol.messages import CODECS, SUBPROTOCOLS
from streamkv.server.admission import Admission
from streamkv.server.config import ServerConfig
from streamkv.server.connection import Connection, new_socket
from streamkv.server.guard import Guard
from streamkv.server.routes import Access, Route, error_response
from streamkv.server.session_store import SessionStore
from streamkv.text.streams import TextStreams

__all__ = ["StreamDoor"]

log = structlog.get_logger(__name__)


class StreamDoor:
    """Holds the WebSocket connections of one process."""

    def __init__(
        self,
        streams: TextStreams,
        config: ServerConfig,
        guard: Guard,
        admission: Admission,
        moved: Callable[[], None],
        recorder: Recorder,
    ) -> None:
        """``moved`` is called whenever a connection has become idle or has ended."""
        self._config = config
        self._guard = guard
        self._moved = moved
        self.connections: set[Connection] = set()
        self.sessions = SessionStore(streams, config, guard.still_valid, admission, moved, recorder)
        guard.revoked.append(self.sessions.recheck)
        self._recorder = recorder
        recorder.outbound = lambda: sum(live.session.outbound_bytes for live in self.sessions)
        self._names = itertools.count(1)
        self._draining = False

    def routes(self) -> list[Route]:
        """One."""
        return [Route("GET", "/v1/stream", self._stream, Access.UPGRADE)]

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        socket = new_socket(self._config.limits)
        chosen = socket.can_prepare(request).protocol
        if chosen is None:
            # aiohttp by itself would go on without any protocol.
            return error_response(400, f"offer the WebSocket subprotocol {' or '.join(SUBPROTOCOLS)}")
        name = f"c{next(self._names)}"
        authenticate = self._guard.authenticate_hello
        connection = Connection(
            name, socket, request, CODECS[chosen], self.sessions, authenticate, self._config, self._moved, self._recorder
        )
        self.connections.add(connection)  # before the first await: it counts, and a drain must not miss it
        try:
            await socket.prepare(request)
            socket.headers.clear()  # they have been sent, and would take half a kilobyte of every idle connection
            log.info("connected", connection=connection.name, protocol=chosen, peer=request.remote)
            await connection.run()
        finally:
            self.connections.discard(connection)
            self._moved()
        return socket

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Everything that must be answered before the upgrade."""
        if self._draining:
            self._recorder.rejected("draining")
            return error_response(503, "the server is shutting down; connect to another one", code="draining")
        if len(self.connections) >= self._config.max_connections:
            self._recorder.rejected("connections")
            return error_response(503, "too many connections; try again later", code="overloaded")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return error_response(426, "this is a WebSocket endpoint; see docs/protocol.md", headers={"Upgrade": "websocket"})
        return None

    # -- shutdown -------------------------------------------------------------------------------------------------

    def drain(self, deadline_s: float, reason: str) -> None:
        """Announce it to every connection."""
        self._draining = True
        for connection in tuple(self.connections):
            connection.drain(deadline_s, reason)
        for live in self.sessions:
            if live.peer is None:
                live.drain(deadline_s, reason)

    @property
    def idle(self) -> bool:
        """True if no connection has a stream or anything to send."""
        return all(connection.idle for connection in self.connections)

    def close(self, reason: str) -> None:
        """End every session, and start the closing handshake of every connection."""
        for live in self.sessions:
            live.close()
        for connection in tuple(self.connections):
            connection.close(1001, f"going_away: {reason}")

    @property
    def closed(self) -> bool:
        """True once every connection has ended."""
        return not self.connections

"""Routes and life cycle: `/v1/stream`, `/health`, `/ready`; SIGTERM drains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from streamkv import __version__
from streamkv.errors import ConfigError
from streamkv.protocol.messages import CODECS, SUBPROTOCOLS
from streamkv.protocol.session import Session
from streamkv.server.config import ServerConfig, is_loopback
from streamkv.server.connection import Connection
from streamkv.text.streams import TextStreams

__all__ = ["Server", "run_until_signalled"]

_CLOSE_S: Final = 5.0  # for the closing handshakes of all connections at once

log = structlog.get_logger(__name__)


class Server:
    """Holds the connections of one process."""

    def __init__(self, streams: TextStreams, config: ServerConfig) -> None:
        """Nothing listens before `listening` is entered."""
        self._streams = streams
        self._config = config
        self._connections: set[Connection] = set()
        self._names = itertools.count(1)
        self._draining = False
        self._moved = asyncio.Event()  # a connection became idle or ended
        self.port = config.port

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=1 << 20)
        app.router.add_get("/v1/stream", self._stream)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        return app

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections inside the block; leaving it ends them."""
        runner = web.AppRunner(self.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._config.host, self._config.port)
            try:
                await site.start()
            except OSError as error:
                where = f"{self._config.host}:{self._config.port}"
                reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
                raise ConfigError(f"cannot listen on {where}: {reason}; choose another --host or --port") from error
            assert site._server is not None  # noqa: SLF001  # aiohttp has no public way to learn the port that 0 became
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # noqa: SLF001  # as above
            yield
        finally:
            await runner.cleanup()

    # -- routes ---------------------------------------------------------------------------------------------------

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        if self._draining or not self._streams.alive:
            return web.json_response({"status": "draining" if self._draining else "engine_lost"}, status=503)
        return web.json_response({"status": "ready", "model": self._streams.info.model})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        socket = web.WebSocketResponse(
            protocols=SUBPROTOCOLS,
            compress=False,
            heartbeat=self._config.limits.heartbeat_s,
            max_msg_size=self._config.limits.frame + 1,  # aiohttp refuses what reaches it
            writer_limit=64 * 1024,
            decode_text=False,
            timeout=3.0,
        )
        chosen = socket.can_prepare(request).protocol
        if chosen is None:
            # aiohttp by itself would go on without any protocol.
            return _error(400, f"offer the WebSocket subprotocol {' or '.join(SUBPROTOCOLS)}")
        codec = CODECS[chosen]
        session = Session(
            codec,
            self._config.limits,
            session_id=secrets.token_urlsafe(16),
            epoch=self._streams.info.epoch,
            server=f"streamkv/{__version__}",
            models=(self._streams.info.model,),
            max_model_len=self._streams.info.max_model_len,
        )
        name = f"c{next(self._names)}"
        connection = Connection(name, socket, request, codec, session, self._streams, self._config, self._moved.set)
        self._connections.add(connection)  # before the first await: it counts, and a drain must not miss it
        try:
            await socket.prepare(request)
            log.info("connected", connection=connection.name, protocol=chosen, peer=request.remote)
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._moved.set()
        return socket

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Everything that must be answered before the upgrade."""
        if self._draining:
            return _error(503, "the server is shutting down; connect to another one")
        if len(self._connections) >= self._config.max_connections:
            return _error(503, "too many connections; try again later")
        if not self._host_allowed(request.host):
            return _error(403, "this Host is not served here; start with --allowed-host to allow it")
        origin = request.headers.get("Origin")
        if origin is not None and not self._origin_allowed(origin, request.host):
            return _error(403, "this Origin is not allowed; start with --allowed-origin to allow it")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return _error(426, "this is a WebSocket endpoint; see docs/protocol.md", {"Upgrade": "websocket"})
        return None

    def _host_allowed(self, host: str) -> bool:
        """A page that rebinds its name to this address sends its own name in `Host`."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self._config.allowed_hosts:
            return name in self._config.allowed_hosts
        if not is_loopback(self._config.host):
            # Reached by whatever name the operator gave the machine; addresses cannot be rebound.
            return True
        return name == self._config.host or is_loopback(name)

    def _origin_allowed(self, origin: str, host: str) -> bool:
        if origin in self._config.allowed_origins:
            return True
        try:
            return origin != "null" and urlsplit(origin).netloc == host
        except ValueError:
            return False

    # -- shutdown -------------------------------------------------------------------------------------------------

    async def drain(self, reason: str) -> bool:
        """Take nothing new, let running streams finish within the drain timeout, close every connection.

        Returns:
            True if every stream finished by itself.
        """
        self._draining = True
        timeout = self._config.drain_timeout_s
        log.info("draining", connections=len(self._connections), seconds=timeout)
        for connection in tuple(self._connections):
            connection.drain(timeout, reason)
        complete = await self._settled(lambda: all(connection.idle for connection in self._connections), timeout)
        for connection in tuple(self._connections):
            connection.close(1001, f"going_away: {reason}")
        await self._settled(lambda: not self._connections, _CLOSE_S)
        log.info("drained", complete=complete)
        return complete

    async def _settled(self, reached: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``reached`` is true; connections say when to look again."""
        try:
            async with asyncio.timeout(timeout_s):
                while not reached():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            return reached()
        return True


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


async def run_until_signalled(server: Server, *, ready: asyncio.Event | None = None) -> bool:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Returns:
        True if every stream finished by itself.
    """
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with server.listening():
            if ready is not None:
                ready.set()
            await first.wait()
            draining = asyncio.create_task(server.drain("the server is shutting down"))
            impatient = asyncio.create_task(second.wait())
            await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
            complete = draining.done() and draining.result()
            for task in (draining, impatient):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            return complete
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

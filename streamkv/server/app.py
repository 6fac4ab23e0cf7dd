"""Life cycle of a server: what it answers, how it listens, how it goes away; SIGTERM drains."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from aiohttp import web

from streamkv.errors import ConfigError
from streamkv.server.config import ServerConfig
from streamkv.server.guard import Guard
from streamkv.server.routes import Access, Door, Route
from streamkv.server.stream_door import StreamDoor
from streamkv.text.streams import TextStreams

__all__ = ["Server", "run_until_signalled"]

_CLOSE_S: Final = 5.0  # for the closing handshakes of all connections at once

log = structlog.get_logger(__name__)


class Server:
    """The doors of one process behind one guard, and their life cycle."""

    def __init__(self, streams: TextStreams, config: ServerConfig) -> None:
        """Nothing listens before `listening` is entered."""
        self._streams = streams
        self._config = config
        self._draining = False
        self._moved = asyncio.Event()  # something became idle or ended
        self.guard = Guard(config)
        self.stream_door = StreamDoor(streams, config, self._moved.set)
        self.doors: list[Door] = [self.stream_door]
        self.port = config.port

    def routes(self) -> list[Route]:
        """Everything that this server answers."""
        own = [
            Route("GET", "/health", self._health, Access.PUBLIC),
            Route("GET", "/ready", self._ready, Access.PUBLIC),
        ]
        return own + [route for door in self.doors for route in door.routes()]

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=1 << 20, middlewares=[self.guard.middleware])
        for route in self.routes():
            # Not `add_get`, which would add a route for HEAD that is not in the table.
            self.guard.protect({app.router.add_route(route.method, route.path, route.handler): route.access})
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

    # -- shutdown -------------------------------------------------------------------------------------------------

    async def drain(self, reason: str) -> bool:
        """Take nothing new, let what runs finish within the drain timeout, then end the rest.

        Returns:
            True if everything finished by itself.
        """
        self._draining = True
        timeout = self._config.drain_timeout_s
        log.info("draining", seconds=timeout)
        for door in self.doors:
            door.drain(timeout, reason)
        complete = await self._settled(lambda: all(door.idle for door in self.doors), timeout)
        for door in self.doors:
            door.close(reason)
        await self._settled(lambda: all(door.closed for door in self.doors), _CLOSE_S)
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

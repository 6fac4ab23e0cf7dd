"""Life cycle of a server: what it answers, how it listens, how it goes away; SIGTERM drains."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from aiohttp import web

from streamkv.observe.observers import Observers
from streamkv.observe.recorder import Recorder
from streamkv.server.admission import Admission
from streamkv.server.chores import Chores
from streamkv.server.config import ServerConfig
from streamkv.server.guard import Guard
from streamkv.server.kv_map import KVDoor
from streamkv.server.listener import Listener
from streamkv.server.metrics import MetricsDoor
from streamkv.server.openai.door import OpenAIDoor
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
        self.admission = Admission(
            streams.info,
            slo_ttft_s=config.slo_ttft_s,
            max_waiting=config.max_waiting,
            queue_timeout_s=config.queue_timeout_s,
        )
        self.recorder = Recorder(streams.info)
        self.admission.rejected = self.recorder.rejected
        streams.observer = Observers(streams.observer, self.admission, self.recorder)
        self._listener = Listener(config)
        self.lost = asyncio.Event()
        """The engine has gone. Nothing can be served any more; whoever started the process should start another one."""
        self._chores = Chores(self.guard, self._listener, streams, self.lost.set)
        self.stream_door = StreamDoor(streams, config, self.guard, self.admission, self._moved.set, self.recorder)
        self.metrics_door = MetricsDoor(self.recorder, streams.client, prefix=config.metrics_prefix, public=config.metrics_public)
        self.doors: list[Door] = [
            self.stream_door,
            OpenAIDoor(streams, config, self.admission, self._moved.set),
            self.metrics_door,
            KVDoor(
                streams.client,
                self.recorder,
                send_timeout_s=config.send_timeout_s,
                moved=self._moved.set,
                still_valid=self.guard.still_valid,
            ),
        ]
        self.port = config.port

    def routes(self) -> list[Route]:
        """Everything that this server answers."""
        own = [
            Route("GET", "/health", self._health, Access.PUBLIC),
            Route("GET", "/ready", self._ready, Access.PUBLIC),
            Route("POST", "/v1/ws-tickets", self.guard.issue_ticket, Access.CLIENT),
        ]
        return own + [route for door in self.doors for route in door.routes()]

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(
            client_max_size=self._config.http.body,
            middlewares=[self.metrics_door.middleware, self._listener.middleware, self.guard.middleware],
        )
        app.cleanup_ctx.append(self.metrics_door.measuring)
        app.on_response_prepare.append(self.metrics_door.count_socket)
        app.on_response_prepare.append(self.guard.decorate)
        for route in self.routes():
            # Not `add_get`, which would add a route for HEAD that is not in the table.
            self.guard.protect({app.router.add_route(route.method, route.path, route.handler): route.access})
        return app

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections inside the block; leaving it ends them."""
        async with self._listener.open(self.app()), self._chores.running():
            self.port = self._listener.ports[0]
            self.guard.admin_port = self._listener.ports[-1] if self._config.admin_port is not None else None
            yield

    @property
    def rereads_keys(self) -> bool:
        """True if there is a file of keys."""
        return self._config.api_keys is not None

    def reread_keys(self) -> None:
        """Soon; for SIGHUP."""
        self._chores.reread_keys()

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
    """Serve until SIGTERM or SIGINT, or until the engine is lost; then drain. A second signal ends at once.

    Returns:
        True if every stream finished by itself.
    """
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if server.rereads_keys:
        loop.add_signal_handler(signal.SIGHUP, server.reread_keys)
    try:
        async with server.listening():
            if ready is not None:
                ready.set()
            if not await _first_of(first, server.lost):
                log.error("engine_lost")
            draining = asyncio.create_task(server.drain("the server is shutting down"))
            impatient = asyncio.create_task(second.wait())
            await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
            complete = draining.done() and draining.result() and not server.lost.is_set()
            for task in (draining, impatient):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            return complete
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _first_of(one: asyncio.Event, other: asyncio.Event) -> bool:
    """Wait for either; True if it was the first one."""
    waiting = {asyncio.create_task(event.wait()) for event in (one, other)}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    return one.is_set()

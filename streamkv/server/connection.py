"""One WebSocket: a reader that feeds a session, and the one writer that empties it. Every send is bounded in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import WSMsgType, web

from streamkv.observe.recorder import NullRecorder
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Close
from streamkv.protocol.frames import read_hello
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.messages import Codec
from streamkv.server.config import ServerConfig
from streamkv.server.live_session import LiveSession
from streamkv.server.principal import Principal
from streamkv.server.session_store import SessionStore

__all__ = ["Connection", "new_socket"]

_CLOSE_TIMEOUT_S: Final = 3.0

log = structlog.get_logger(__name__)


def new_socket(limits: SessionLimits) -> web.WebSocketResponse:
    """A socket that speaks the wire protocol, with the bounds of a session."""
    return web.WebSocketResponse(
        protocols=m.SUBPROTOCOLS,
        compress=False,
        heartbeat=limits.heartbeat_s,
        max_msg_size=limits.frame + 1,  # aiohttp refuses what reaches it
        writer_limit=64 * 1024,
        decode_text=False,
        timeout=_CLOSE_TIMEOUT_S,
    )


class _Bell:
    """An `asyncio.Event` for one waiter that takes next to no memory while nobody waits: most connections are idle."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        self._rung = False

    async def wait(self) -> None:
        while not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None


class Connection:
    """Lives as long as the handler that awaits `run`; its session may live longer."""

    def __init__(
        self,
        name: str,
        socket: web.WebSocketResponse,
        request: web.Request,
        codec: Codec,
        store: SessionStore,
        authenticate: Callable[[web.Request, str | None], Principal | None],
        config: ServerConfig,
        on_idle: Callable[[], None],
        recorder: NullRecorder,
    ) -> None:
        """Take over a prepared socket.

        Args:
            authenticate: who is behind it, told by its request and the token of its first frame.
            on_idle: called whenever nothing is left to send and no stream is alive.
        """
        self.name = name
        self.live: LiveSession | None = None
        self.aborted = False
        self._socket = socket
        self._request = request
        self._codec = codec
        self._store = store
        self._authenticate = authenticate
        self._config = config
        self._on_idle = on_idle
        self._recorder = recorder
        self._replayed = 0
        self._wake = _Bell()
        self._room = _Bell()  # the writer has sent something, or has ended
        self._closing: Close | None = None
        self._hello_limit: asyncio.TimerHandle | None = None  # until it has come; a timer takes more than half a kilobyte

    async def run(self) -> None:
        """Until either side closes."""
        self._hello_limit = asyncio.get_running_loop().call_later(self._config.limits.hello_s, self._hello_late)
        writer = asyncio.create_task(self._write(), name=f"{self.name}-writer")
        try:
            await self._read(writer)
        finally:
            self._end_hello_limit()
            if self.live is not None:
                self.live.detach(self)
            if self._closing is None:
                writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            if self.live is not None and self.live.session.closed:
                await self.live.ended()
            self._store.balance()
            self._log.info("disconnected", code=self._socket.close_code)

    async def _read(self, writer: asyncio.Task[None]) -> None:
        async for message in self._socket:
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                break
            self._receive(message.data, is_text=message.type is WSMsgType.TEXT)
            while self.live is not None and self.live.session.crowded and not writer.done():
                # Who does not take the answers cannot ask on: TCP tells it so, and the writer's time limit ends it.
                self._room.clear()
                await self._room.wait()
            if self._closing is not None or writer.done():
                break

    def _receive(self, data: bytes, *, is_text: bool) -> None:
        if self.live is not None:
            if self._is_current:  # else it speaks for a session that another connection has taken over
                self.live.receive(data, is_text=is_text)
            return
        hello = read_hello(self._codec, data, is_text=is_text)
        if isinstance(hello, Close):
            self.close(hello.code, hello.reason)
            return
        principal = self._authenticate(self._request, hello.token)
        if principal is None:
            self.close(4401, "unauthorized: send a valid key or ticket as token")
            return
        self.live = self._store.open(hello, self._codec, principal, self, time.monotonic())
        self._end_hello_limit()
        self.wake()

    def _hello_late(self) -> None:
        self.close(4408, "hello_timeout: send hello first")

    def _end_hello_limit(self) -> None:
        if self._hello_limit is not None:
            self._hello_limit.cancel()
            self._hello_limit = None

    # -- the session's peer ---------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """Send what is pending, then close; the reader ends with the peer's answer or a time limit."""
        if self._closing is None:
            self._closing = Close(code, reason)
            self._wake.set()

    def abort(self, reason: str) -> None:
        """Drop the connection at once: a polite close would wait for a flush that never comes."""
        if reason == "slow_consumer":
            self._recorder.slow_consumer()
        transport = self._request.transport
        if transport is not None and not self.aborted:
            self.aborted = True
            self._log.warning("aborted", reason=reason)
            transport.abort()

    def drain(self, deadline_s: float, reason: str) -> None:
        """Announce that the server is going away; who has not said hello has nothing to finish."""
        if self.live is None:
            self.close(1001, f"going_away: {reason}")
        elif self._is_current:
            self.live.drain(deadline_s, reason)

    @property
    def idle(self) -> bool:
        """True if no stream is alive and everything has been sent."""
        return not self._is_current or self.live is None or self.live.session.num_streams == 0

    @property
    def _is_current(self) -> bool:
        """False once another connection has taken the session over."""
        return self.live is not None and self.live.peer is self

    @property
    def _log(self) -> structlog.stdlib.BoundLogger:
        """Made when needed: it would take half a kilobyte of every idle connection."""
        logger: structlog.stdlib.BoundLogger = log.bind(connection=self.name)
        return logger

    # -- the writer -----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Send what is due until told to close."""
        try:
            while True:
                if await self._send_next():
                    self._room.set()
                    continue
                if self._closing is not None:
                    break
                if self.idle:
                    self._on_idle()
                self._wake.clear()
                await self._woken(self._next_due())
            await self._close_socket(self._closing)
        except TimeoutError:
            # aiohttp's heartbeat closes politely and waits for a flush that never comes; only abort frees the handler.
            self.abort("slow_consumer")
        except ConnectionError:
            self.abort("connection_lost")
        except Exception:
            self._log.exception("writer_failed")
            self.abort("writer_failed")
        finally:
            self._room.set()

    async def _woken(self, due_s: float | None) -> None:
        """Wait until there may be something to send, or until something is due."""
        if due_s is None:  # as nearly all connections are nearly always: without the objects of a time limit
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due_s):
                await self._wake.wait()

    async def _send_next(self) -> bool:
        """Send one message; False if none is due."""
        if self.live is None or not (self._is_current or self.live.session.closed):
            return False
        message = self.live.next_message(busy=self._busy)
        if message is None:
            return False
        began = time.monotonic()
        async with asyncio.timeout(self._config.send_timeout_s):
            await self._socket.send_frame(self._codec.encode(message), WSMsgType.TEXT if self._codec.text else WSMsgType.BINARY)
        if isinstance(message, m.Delta):
            self._recorder.frame(message.n, time.monotonic() - began)
        elif isinstance(message, m.Resumed):
            before, self._replayed = self._replayed, self.live.session.num_replayed
            self._recorder.resumed(self._replayed - before)
        elif isinstance(message, m.Error) and message.code == "resume_gone":
            self._recorder.resume_gone()
        return True

    def _next_due(self) -> float | None:
        return (
            self.live.session.next_due(time.monotonic(), busy=self._busy) if self.live is not None and self._is_current else None
        )

    @property
    def _busy(self) -> bool:
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() > 0

    async def _close_socket(self, closing: Close) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._socket.close(code=closing.code, message=closing.reason.encode()[:123])
        except TimeoutError:
            self.abort("close_timeout")

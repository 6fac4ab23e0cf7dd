"""Server-sent events: one response that is written piece by piece. Every write is bounded in time, and silence has a sign."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog
from aiohttp import web

from streamkv.server.config import ServerConfig
from streamkv.server.request_id import about

__all__ = ["DONE", "HEARTBEAT_S", "EventStream", "Timing", "abort", "event", "send_whole"]

HEARTBEAT_S: Final = 15.0
"""Proxies close what is silent for a minute, some for half of one."""

DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": hb\n\n"
_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx: pass every event on at once
}

log = structlog.get_logger(__name__)


class _Timer(Protocol):
    def cancel(self) -> object:
        """Not to happen any more."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Clock and bounds.

    Attributes:
        clock: seconds, monotonic.
        call_later: as the event loop's; None = that of the running loop.
    """

    send_timeout_s: float
    heartbeat_s: float = HEARTBEAT_S
    clock: Callable[[], float] = time.monotonic
    call_later: Callable[[float, Callable[[], None]], _Timer] | None = None

    @classmethod
    def of(cls, config: ServerConfig) -> Timing:
        """As the server is configured."""
        return cls(config.send_timeout_s)

    def later(self, delay_s: float, callback: Callable[[], None]) -> _Timer:
        """Call back once."""
        return (self.call_later or asyncio.get_running_loop().call_later)(delay_s, callback)


def event(data: bytes) -> bytes:
    """One event."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """An event stream to one client."""

    def __init__(self, request: web.Request, wake: asyncio.Event, timing: Timing) -> None:
        """Nothing is sent before `start`.

        Args:
            wake: set when it is time for a sign of life; then call `send` with what there is, even if that is nothing.
        """
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)
        self._wake = wake
        self._timing = timing
        self._sent_at = timing.clock()
        self._timer: _Timer | None = None

    async def start(self) -> None:
        """Send the headers. Raises what `send` does."""
        async with asyncio.timeout(self._timing.send_timeout_s):
            await self.response.prepare(self._request)
        self._timer = self._timing.later(self._timing.heartbeat_s, self._tick)

    async def send(self, data: bytes) -> None:
        """Send events; or, if there are none and there have been none for a while, a comment.

        Raises:
            TimeoutError: the client does not read.
            ConnectionError: it is gone.
        """
        now = self._timing.clock()
        if not data:
            if now - self._sent_at < self._timing.heartbeat_s:
                return
            data = _COMMENT
        self._sent_at = now
        async with asyncio.timeout(self._timing.send_timeout_s):
            await self.response.write(data)

    async def finish(self, data: bytes) -> None:
        """Send the last events and wait until everything is on its way. Raises what `send` does."""
        self.close()
        await _send_last(self._request, self.response, data, self._timing.send_timeout_s)

    def close(self) -> None:
        """No more signs of life."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        silent = self._timing.clock() - self._sent_at
        left = self._timing.heartbeat_s - silent
        if left <= 0:
            left = self._timing.heartbeat_s
            self._wake.set()
        self._timer = self._timing.later(left, self._tick)


async def send_whole(request: web.Request, response: web.Response, timeout_s: float) -> web.Response:
    """Send a response here and not after the handler has returned, so that the time is bounded and it counts as work.

    Raises:
        ConnectionError: the client is gone, or does not read.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await response.prepare(request)
        await _send_last(request, response, b"", timeout_s)
    except TimeoutError as error:
        abort(request, "slow_consumer")
        raise ConnectionResetError("the client does not read") from error
    return response


async def _send_last(request: web.Request, response: web.StreamResponse, data: bytes, timeout_s: float) -> None:
    """End the body; returns once the kernel has all of it, for a rest in our own buffer would be nobody's any more."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    transport.set_write_buffer_limits(0)  # any rest counts as full, and is waited for
    try:
        async with asyncio.timeout(timeout_s):
            await response.write_eof(data)
    finally:
        if not transport.is_closing():
            transport.set_write_buffer_limits()


def abort(request: web.Request, reason: str) -> None:
    """End the connection at once: a polite end would wait for a client that does not read."""
    transport: Any = request.transport
    if transport is not None:
        log.warning("aborted", **about(request), reason=reason, peer=request.remote)
        transport.abort()

"""`GET /v1/kv/map`, a picture of every KV block, and `GET /v1/kv/live`, the same as it changes, over a WebSocket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from aiohttp import WSMsgType, web

from streamkv.engine.api import EngineClient, EngineStats, KVMap
from streamkv.observe.recorder import Recorder
from streamkv.server.kv_view import Viewer, encode
from streamkv.server.principal import Principal, is_known, principal_of
from streamkv.server.routes import Access, Route, error_response

__all__ = ["LIVE_PROTOCOL", "KVDoor"]

LIVE_PROTOCOL: Final = "streamkv.kv.v1.json"

_INTERVAL_S: Final = 0.25
_SHARE: Final = 20
"""A look at the blocks is not taken again before this many times what the last one took: looking costs at most 5 %."""

log = structlog.get_logger(__name__)


class KVDoor:
    """All viewers share one look at the engine. What a viewer gets next is told from what it got last, never queued."""

    def __init__(
        self,
        client: EngineClient,
        recorder: Recorder,
        *,
        max_viewers: int = 16,
        send_timeout_s: float = 10.0,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        moved: Callable[[], None] = lambda: None,
        still_valid: Callable[[Principal], bool] = lambda _principal: True,
    ) -> None:
        """No viewer yet.

        Args:
            send_timeout_s: a viewer that takes longer for a message is cut off.
            interval_s: shortest time between two messages.
            moved: called when a viewer has left.
            still_valid: asked before every message; who has lost his key sees no more.
        """
        self._client = client
        self._recorder = recorder
        self._max_viewers = max_viewers
        self._send_timeout_s = send_timeout_s
        self._interval_s = interval_s
        self._clock = clock
        self._moved = moved
        self._still_valid = still_valid
        self._sockets: set[web.WebSocketResponse] = set()
        self._closing = asyncio.Event()
        self._reason = ""
        self._look: tuple[KVMap, EngineStats] | None = None
        self._look_again_at = float("-inf")

    def routes(self) -> list[Route]:
        """Two."""
        return [
            Route("GET", "/v1/kv/map", self._map, Access.CLIENT),
            Route("GET", "/v1/kv/live", self._live, Access.UPGRADE),
        ]

    # -- looking --------------------------------------------------------------------------------------------------

    async def _take(self) -> tuple[KVMap, EngineStats]:
        now = self._clock()
        if self._look is None or now >= self._look_again_at:
            kv, stats = await self._client.kv_map(), await self._client.stats()
            spent = self._clock() - now
            self._look = kv, stats
            self._look_again_at = now + max(self._interval_s, _SHARE * spent)
        return self._look

    def _load(self, principal: Principal, kv: KVMap, stats: EngineStats) -> dict[str, Any] | None:
        """Of the whole server, so for admins only: other tenants' counts tell what they do."""
        if not principal.is_admin:
            return None
        histograms = {"ttft": self._recorder.metrics.ttft, "itl": self._recorder.metrics.itl}
        return {
            "waiting": stats.waiting,
            "running": stats.running,
            "stalled": sum(request.parked for request in kv.requests),
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "output_tokens": stats.output_tokens,
            "preemptions": stats.preemptions,
            "lag": {"le": self._recorder.lag.histogram.bounds, "n": self._recorder.lag.histogram.counts},
        } | {name: {"le": histogram.bounds, "n": histogram.counts} for name, histogram in histograms.items()}

    async def _message(self, viewer: Viewer, principal: Principal, *, first: bool) -> bytes:
        kv, stats = await self._take()
        load = self._load(principal, kv, stats)
        # Off the loop: it is a pure function of values that nobody changes any more.
        return await asyncio.to_thread(lambda: encode((viewer.snapshot if first else viewer.delta)(kv, load)))

    async def _map(self, request: web.Request) -> web.Response:
        principal = principal_of(request)
        body = await self._message(_viewer(principal), principal, first=True)
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    # -- live -----------------------------------------------------------------------------------------------------

    async def _live(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        socket = web.WebSocketResponse(
            protocols=(LIVE_PROTOCOL,), compress=False, heartbeat=20.0, max_msg_size=1024, writer_limit=64 * 1024, timeout=3.0
        )
        if socket.can_prepare(request).protocol is None:
            return error_response(400, f"offer the WebSocket subprotocol {LIVE_PROTOCOL}")
        self._sockets.add(socket)  # before the first await: it counts
        try:
            await socket.prepare(request)
            await self._serve(request, socket)
        finally:
            self._sockets.discard(socket)
            self._moved()
        return socket

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self._closing.is_set():
            return error_response(503, "the server is shutting down; connect to another one", code="draining")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return error_response(
                426, "this is a WebSocket endpoint; see docs/observability.md", headers={"Upgrade": "websocket"}
            )
        if not is_known(request):
            # Nothing is read from the client here, so it cannot prove itself in a first frame.
            headers = {"WWW-Authenticate": "Bearer"}
            return error_response(
                401, "send an API key, or a ticket from POST /v1/ws-tickets", code="unauthorized", headers=headers
            )
        if len(self._sockets) >= self._max_viewers:
            return error_response(503, "too many viewers; try again later", code="overloaded")
        return None

    async def _serve(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        """Write until either side ends; read only to learn that."""
        log.info("kv_viewer_connected", peer=request.remote)
        writer = asyncio.create_task(self._write(request, socket), name="streamkv-kv-viewer")
        try:
            async for message in socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    await socket.close(code=1003, message=b"nothing_expected: this socket only sends")
        finally:
            writer.cancel()
            await asyncio.wait({writer})
            if not writer.cancelled() and (error := writer.exception()) is not None:
                log.error("kv_viewer_failed", exc_info=error)

    async def _write(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        principal = principal_of(request)
        viewer = _viewer(principal)
        first = True
        try:
            while not self._closing.is_set():
                if not self._still_valid(principal):
                    await self._end(socket, 4401, "unauthorized: this API key has been revoked")
                    return
                body = await self._message(viewer, principal, first=first)
                first = False
                async with asyncio.timeout(self._send_timeout_s):
                    await socket.send_frame(body, WSMsgType.TEXT)
                await self._pause()
            await self._end(socket, 1001, f"going_away: {self._reason}")
        except TimeoutError:
            self._recorder.slow_consumer()
            log.warning("kv_viewer_aborted", reason="slow_consumer")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            return

    async def _end(self, socket: web.WebSocketResponse, code: int, reason: str) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await socket.close(code=code, message=reason.encode()[:123])

    async def _pause(self) -> None:
        """Until it is worth looking again, or the server closes."""
        wait = max(self._interval_s, self._look_again_at - self._clock())
        waiting = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({waiting}, timeout=wait)
        finally:
            waiting.cancel()

    # -- shutdown -------------------------------------------------------------------------------------------------

    def drain(self, deadline_s: float, reason: str) -> None:
        """Viewers may watch to the end."""

    @property
    def idle(self) -> bool:
        """A viewer is no work in progress."""
        return True

    def close(self, reason: str) -> None:
        """Say good-bye to all viewers."""
        self._reason = reason
        self._closing.set()

    @property
    def closed(self) -> bool:
        """True once the last viewer has left."""
        return not self._sockets


def _viewer(principal: Principal) -> Viewer:
    return Viewer(None if principal.is_admin else principal.tenant)

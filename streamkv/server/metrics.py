"""`GET /metrics`: what Prometheus scrapes; and the counting of HTTP requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from streamkv.engine.api import EngineClient
from streamkv.observe.context import OPERATION, TRACEPARENT, read_traceparent
from streamkv.observe.exposition import CONTENT_TYPE
from streamkv.observe.metrics import Prefix
from streamkv.observe.recorder import Recorder
from streamkv.server.routes import Access, Route

__all__ = ["MetricsDoor"]

_FRESH_S: Final = 0.25
"""Scrapes that follow each other faster see the same numbers: looking at every block is not free."""


_SOCKET_SINCE: Final = web.RequestKey("socket_since", float)
_CLIENT_LEFT: Final = 499
"""What nginx calls it."""


class MetricsDoor:
    """Shows what the recorder has booked. Has no work in progress of its own."""

    def __init__(
        self,
        recorder: Recorder,
        client: EngineClient,
        *,
        prefix: Prefix = "vllm",
        public: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`public`: whoever can connect may read; else an admin's key is needed, which Prometheus sends as a bearer token."""
        self.recorder = recorder
        self._client = client
        self._prefix = prefix
        self._access = Access.PUBLIC if public else Access.ADMIN
        self._clock = clock
        self._sampled_at = float("-inf")

    def routes(self) -> list[Route]:
        """One."""
        return [Route("GET", "/metrics", self._metrics, self._access)]

    async def _metrics(self, _request: web.Request) -> web.Response:
        await self.sample()
        text = self.recorder.metrics.text(self._prefix)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    async def sample(self) -> None:
        """Look at the engine, unless somebody has a moment ago."""
        now = self._clock()
        if now - self._sampled_at >= _FRESH_S:
            self._sampled_at = now
            self.recorder.sample(await self._client.stats(), await self._client.kv_map())

    async def measuring(self, _app: web.Application) -> AsyncIterator[None]:
        """For `Application.cleanup_ctx`: measure the loop while the server listens."""
        self.recorder.lag.start()
        yield
        self.recorder.lag.stop()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count every answer. The label is the route's own path: what clients send would make labels without end."""
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "none"
        method = request.method if resource is not None else "none"
        TRACEPARENT.set(read_traceparent(request.headers.get("traceparent")))
        OPERATION.set("chat" if path == "/v1/chat/completions" else "text_completion")
        status, began = 500, self._clock()
        try:
            response = await handler(request)
            status = response.status
        except web.HTTPException as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = _CLIENT_LEFT
            raise
        finally:
            since = request.get(_SOCKET_SINCE)
            if since is not None:
                status = 101  # was the answer; how the socket ended is another matter
                self.recorder.disconnected(self._clock() - since)
            self.recorder.http(path, method, status, self._clock() - began)
        return response

    async def count_socket(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `Application.on_response_prepare`."""
        if isinstance(response, web.WebSocketResponse):
            request[_SOCKET_SINCE] = self._clock()
            self.recorder.connected()

    # -- a door without work in progress --------------------------------------------------------------------------

    def drain(self, deadline_s: float, reason: str) -> None:
        """A server that goes away can still be looked at."""

    @property
    def idle(self) -> bool:
        """Always."""
        return True

    def close(self, reason: str) -> None:
        """Nothing to end."""

    @property
    def closed(self) -> bool:
        """Always."""
        return True

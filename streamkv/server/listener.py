"""Listening sockets, TLS, and what aiohttp's own defaults leave open: slow heads, compressed bodies, wordy errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from streamkv.errors import ConfigError
from streamkv.server.config import HttpLimits, ServerConfig
from streamkv.server.request_id import REQUEST_ID, about, log_failed, request_id
from streamkv.server.routes import error_response

__all__ = ["Connections", "Listener", "tls_context"]

_SHUTDOWN_S: Final = 1.0
_LINGER_S: Final = 1.0  # for a client that is still sending a refused body to notice the answer
_PROBES: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

log = structlog.get_logger(__name__)

# It would write the subprotocols that a client offers, and a ticket may be among them.
logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)


class Connections:
    """Those that have not sent a request yet. aiohttp itself gives every head as long as an idle connection may live."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self._limit = limit_s
        self._clock = clock
        self._silent: dict[web.RequestHandler, float] = {}  # until when, in that order

    def __len__(self) -> int:
        return len(self._silent)

    def made(self, handler: web.RequestHandler) -> None:
        """A new one."""
        self._silent[handler] = self._clock() + self._limit

    def spoke(self, handler: web.RequestHandler) -> None:
        """Its first head is complete, or it has gone."""
        self._silent.pop(handler, None)

    def end_slow(self) -> None:
        """End those whose time is over."""
        now = self._clock()
        while self._silent:
            handler, until = next(iter(self._silent.items()))
            if until > now:
                break
            del self._silent[handler]
            if handler.transport is not None:
                handler.transport.abort()


class _Handler(web.RequestHandler):
    """aiohttp's, with one sentence for everything that is not HTTP instead of the parser's words about it."""

    __slots__ = ("connections",)

    connections: Connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out within two minutes that the peer's machine is gone; the kernel's own default is two hours."""
        super().connection_made(transport)
        self.connections.made(self)
        connected = transport.get_extra_info("socket")
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It need not be looked after any more."""
        self.connections.spoke(self)
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp itself refuses before the guard is asked (an `Expect` that it does not know) has its form as well."""
        if isinstance(resp, web.HTTPException):
            resp = self.handle_error(request, resp.status)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a head that cannot be parsed, or to a handler that failed where the guard could not see it."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status >= 500:
            log.error("handler_failed", **about(request), exc_info=exc)
            response = error_response(status, "the server failed on this request; its log says why", code="internal")
        else:
            response = error_response(status, "this is not a request that HTTP allows, or it is too large")
        response.headers[hdrs.SERVER] = "streamkv"
        response.headers[REQUEST_ID] = request_id(request)
        response.force_close()
        log_failed(request, response)
        return response


class Listener:
    """The sockets of one server."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing listens before `open`."""
        self._config = config
        self._limits: HttpLimits = config.http
        self.connections = Connections(config.http.head_s, clock)
        self.ports: list[int] = []
        """As bound: the server's, then the admin port's if there is one."""

    @asynccontextmanager
    async def open(self, app: web.Application) -> AsyncIterator[None]:
        """Accept connections inside the block; leaving it ends them.

        Raises:
            ConfigError: an address cannot be listened on, or the TLS files are of no use.
        """
        config = self._config
        wanted = [(config.host, config.port)]
        if config.admin_port is not None:
            wanted.append((config.admin_host, config.admin_port))
        tls = tls_context(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        server = runner.server
        assert server is not None
        listening: list[asyncio.Server] = []
        try:
            for host, port in wanted:
                listening.append(await self._listen(partial(self._connected, server), host, port, tls))
            self.ports = [one.sockets[0].getsockname()[1] for one in listening]
            yield
        finally:
            for one in listening:
                one.close()
            await runner.cleanup()

    async def _listen(
        self, connected: Callable[[], web.RequestHandler], host: str, port: int, tls: ssl.SSLContext | None
    ) -> asyncio.Server:
        try:
            return await asyncio.get_running_loop().create_server(
                connected,
                host,
                port,
                ssl=tls,
                ssl_handshake_timeout=self._limits.head_s if tls else None,
                backlog=self._limits.backlog,
            )
        except OSError as error:
            reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error

    def _connected(self, server: web.Server) -> web.RequestHandler:
        limits = self._limits
        handler = _Handler(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own way to say that there is none
            keepalive_timeout=limits.keepalive_s,
            tcp_keepalive=True,
            max_line_size=limits.line,
            max_field_size=limits.field,
            max_headers=limits.headers,
            lingering_time=_LINGER_S,
            auto_decompress=False,
        )
        handler.connections = self.connections
        return handler

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Outermost: the request's connection has sent a head in time."""
        self.connections.spoke(request.protocol)
        return await handler(request)


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a server: TLS 1.2 or later.

    Raises:
        ConfigError: the files cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with contextlib.suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ConfigError:
        raise
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        raise ConfigError(
            f"cannot use the TLS certificate {certificate} with the key {key}: {reason}", param="tls_cert"
        ) from error
    except OSError as error:
        missing = certificate if not certificate.is_file() else key
        raise ConfigError(f"cannot read {missing}: {error.strerror or 'it is no file'}", param="tls_cert") from error
    return context


def _no_password() -> str:
    raise ConfigError("the TLS key is encrypted; give one without a password", param="tls_key")

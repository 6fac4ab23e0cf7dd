"""Before any handler: whose request is this, and may it come in. Default-deny by route object, never by path.

What comes back when something is refused, or goes wrong, is one of a closed set of sentences: nothing of the server's
inside gets out. Every answer names its request, and so does the log's line of one that failed. Bodies are read here, bounded
in size and time, so that no handler ever waits for a slow client.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

from streamkv.errors import StreamKVError, UnauthorizedError
from streamkv.server.auth import Authenticator
from streamkv.server.config import ServerConfig, is_loopback
from streamkv.server.keys import KeyStore
from streamkv.server.limits import Places, network_of
from streamkv.server.principal import ANONYMOUS, OPERATOR, Principal, is_known, principal_of, set_principal
from streamkv.server.request_id import REQUEST_ID, about, log_failed, request_id
from streamkv.server.routes import Access, error_response, status_of
from streamkv.server.tickets import TICKET_S

__all__ = ["Guard", "error_of"]

_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._\-]+)(:[0-9]{1,5})?")
_VERSIONS: Final = (HttpVersion10, HttpVersion11)
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SENTENCES: Final = {
    404: ("not_found", "there is nothing at this path"),
    405: ("method_not_allowed", "this path does not answer that method"),
    413: ("too_large", "the body is too large"),
}

log = structlog.get_logger(__name__)


class _Seat:
    """The place of a WebSocket that has not proved yet who it is; given back when it has, or has ended."""

    def __init__(self, places: Places, network: str) -> None:
        self._leave: Callable[[], None] | None = lambda: places.leave(network)

    def leave(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


_SEAT: Final = web.RequestKey("seat", _Seat)


class Guard:
    """Checks every request. One per server."""

    def __init__(self, config: ServerConfig) -> None:
        """Read the keys.

        Raises:
            ConfigError: they cannot be read.
        """
        self._config = config
        alone = all(is_loopback(host) for host in config.addresses)
        self.auth = Authenticator(KeyStore(config.api_keys, config.api_key, config.admin_key), OPERATOR if alone else ANONYMOUS)
        self.revoked: list[Callable[[], None]] = []  # called when keys have changed: look at your connections again
        self.admin_port = config.admin_port  # once listening, the port that 0 became
        self.strangers = Places(config.max_unauthenticated)
        self._access: dict[Any, Access] = {}

    def protect(self, access: Mapping[Any, Access]) -> None:
        """Tell who may use which of aiohttp's route objects; a route that is not named here answers nobody."""
        self._access.update(access)

    # -- every request --------------------------------------------------------------------------------------------

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse, or say who is asking and go on."""
        try:
            response = await self._answer(request, handler)
        except Exception as error:
            if request.writer.output_size > 0:
                raise  # an answer has begun, nothing else can be said: the connection ends
            response = _failure(request, error)
        if response.status >= 400:
            log_failed(request, response)
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.version not in _VERSIONS:  # the parser takes a line without any for one of version 0.9
            return _closing(error_response(400, "send HTTP/1.1"))
        route = request.match_info.route
        access = self._access.get(route)
        if access is None:
            return self._no_route(request)
        if access is Access.PUBLIC:
            return await handler(request)
        refusal = self._refusal(request, access)
        if refusal is not None:
            return refusal
        if access is Access.UPGRADE:
            return await self._upgrade(request, handler)
        principal = self.auth.of_header(request)
        if principal is None:
            raise UnauthorizedError("an API key is needed: send the header Authorization: Bearer KEY")
        if access is Access.ADMIN and not principal.is_admin:
            return error_response(403, "this needs an administrator's API key", code="forbidden")
        if request.method in _WITH_BODY:
            bad_body = await self._read_body(request)
            if bad_body is not None:
                return bad_body
        set_principal(request, principal)
        return await handler(request)

    def _refusal(self, request: web.Request, access: Access) -> web.Response | None:
        if not self._host_allowed(request.headers.get(hdrs.HOST, "")):
            return error_response(403, "this Host is not served here; start with --allowed-host to allow it", code="forbidden")
        if not self._origin_allowed(request):
            return error_response(403, "this Origin is not allowed; start with --allowed-origin to allow it", code="forbidden")
        if self._config.admin_port is not None and (access is Access.ADMIN) != self._at_admin_port(request):
            return _sentence(404)
        return None

    def _no_route(self, request: web.Request) -> web.Response:
        """No such path, or no such method there; or a browser that asks first whether a page may."""
        error = request.match_info.http_exception
        if not isinstance(error, web.HTTPMethodNotAllowed):
            return _sentence(404)
        allow = ", ".join(sorted(error.allowed_methods))
        if request.method != "OPTIONS" or request.headers.get(hdrs.ORIGIN) not in self._config.allowed_origins:
            return _sentence(405, {hdrs.ALLOW: allow})
        # The origin itself is added to every answer, by `decorate`.
        return web.Response(
            status=204,
            headers={
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: allow,
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "authorization, *",  # which has to be named; SDKs send a dozen of their own
                hdrs.ACCESS_CONTROL_MAX_AGE: "600",
            },
        )

    async def decorate(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers of every answer; aiohttp calls it before the first byte."""
        response.headers[hdrs.SERVER] = "streamkv"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers[REQUEST_ID] = request_id(request)
        origin = request.headers.get(hdrs.ORIGIN)
        if self._config.allowed_origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if origin in self._config.allowed_origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = f"{hdrs.RETRY_AFTER}, {REQUEST_ID}"

    async def _read_body(self, request: web.Request) -> web.Response | None:
        """Leave the body in the request; None if it is one."""
        if request.content_type != "application/json":
            # Also what keeps other sites' forms out: a browser asks first before it sends this type.
            return error_response(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            return error_response(415, "send the body without Content-Encoding", code="unsupported_media_type")
        try:
            async with asyncio.timeout(self._config.http.body_s):
                await request.read()
        except TimeoutError:
            return _closing(error_response(408, "the body took too long", code="timeout"))
        except web.HTTPRequestEntityTooLarge:
            return _closing(_sentence(413))
        return None

    # -- who is asking --------------------------------------------------------------------------------------------

    def authenticate_upgrade(self, request: web.Request) -> Principal | None:
        """Who opens a WebSocket, by key or ticket; None if its first frame must tell.

        Raises:
            UnauthorizedError: the key or the ticket is not valid.
        """
        return self.auth.of_upgrade(request)

    def authenticate_hello(self, request: web.Request, token: str | None) -> Principal | None:
        """Who is behind a WebSocket, once its first frame is there; None = close it.

        Args:
            token: what the frame had: a key or a ticket. Needed only if the upgrade came without either.
        """
        if not is_known(request):
            principal = self.auth.of_token(token)
            if principal is None:
                return None
            set_principal(request, principal)
            request[_SEAT].leave()
        return principal_of(request)

    def still_valid(self, principal: Principal) -> bool:
        """False once the key that proved it has been revoked. For everything that outlives a request."""
        return self.auth.still_valid(principal)

    async def reload_keys(self, *, even_if_unchanged: bool = False) -> None:
        """Read the file of keys again if it has changed, and have everybody look at his connections again."""
        # In a thread: disks can be slow.
        if await asyncio.to_thread(self.auth.keys.reload, even_if_unchanged=even_if_unchanged):
            for look in self.revoked:
                look()

    async def issue_ticket(self, request: web.Request) -> web.Response:
        """`POST /v1/ws-tickets`: a ticket for one upgrade by a browser."""
        ticket = self.auth.issue_ticket(principal_of(request))
        return web.json_response({"ticket": ticket, "expires_in": int(TICKET_S)}, headers={hdrs.CACHE_CONTROL: "no-store"})

    async def _upgrade(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        principal = self.authenticate_upgrade(request)
        if principal is not None:
            set_principal(request, principal)
            return await handler(request)
        if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            raise UnauthorizedError("an API key is needed: send the header Authorization: Bearer KEY")
        network = network_of(request.remote)
        if not self.strangers.enter(network):
            return error_response(
                429, "too many connections that have not proved who they are", code="rate_limited", headers={"Retry-After": "5"}
            )
        seat = request[_SEAT] = _Seat(self.strangers, network)
        try:
            return await handler(request)
        finally:
            seat.leave()

    # -- where from and where to ----------------------------------------------------------------------------------

    def _host_allowed(self, host: str) -> bool:
        """A page that rebinds its name to this address sends its own name in `Host`; addresses cannot be rebound."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match["name"].strip("[]").lower()
        if self._config.allowed_hosts:
            return name in self._config.allowed_hosts
        if name in self._config.addresses or is_loopback(name):
            return True
        if all(is_loopback(address) for address in self._config.addresses):
            return False
        # Reached by whatever name the operator gave the machine. A page that has no key gains nothing by rebinding;
        # where no key is needed, only names that are surely this machine's own will do.
        return self.auth.required or _is_address(name) or name == socket.gethostname().lower()

    def _origin_allowed(self, request: web.Request) -> bool:
        origins = request.headers.getall(hdrs.ORIGIN, [])
        if not origins:
            return True
        host = request.headers.get(hdrs.HOST, "")
        # Behind a proxy that ends TLS the page's scheme is not ours.
        own = {f"http://{host}", f"https://{host}"}
        return len(origins) == 1 and (origins[0] in own or origins[0] in self._config.allowed_origins)

    def _at_admin_port(self, request: web.Request) -> bool:
        name = request.get_extra_info("sockname")
        return name is not None and name[1] == self.admin_port


def error_of(error: StreamKVError) -> web.Response:
    """The answer that an error raised on purpose becomes."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, UnauthorizedError):
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    return error_response(status_of(error), error.message, code=error.code, param=error.param, headers=headers)


def _sentence(status: int, headers: dict[str, str] | None = None) -> web.Response:
    code, sentence = _SENTENCES[status]
    return error_response(status, sentence, code=code, headers=headers)


def _closing(response: web.Response) -> web.Response:
    response.force_close()
    return response


def _failure(request: web.Request, error: Exception) -> web.Response:
    if isinstance(error, StreamKVError):
        return error_of(error)
    if isinstance(error, web.HTTPException):
        code, sentence = _SENTENCES.get(error.status, ("invalid_request", "the request cannot be understood"))
        return error_response(error.status, sentence, code=code)
    if isinstance(error, web.RequestPayloadError | ConnectionError):
        return _closing(error_response(400, "the body ended early or is malformed"))
    log.error("handler_failed", **about(request), method=request.method, peer=request.remote, exc_info=error)
    return error_response(500, "the server failed on this request; its log says why", code="internal")


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False

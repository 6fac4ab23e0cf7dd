"""Before any handler: whose request is this, and may it come in. Default-deny by route object, never by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from streamkv.server.config import ServerConfig, is_loopback
from streamkv.server.principal import ANONYMOUS, set_principal
from streamkv.server.routes import Access, error_response

__all__ = ["Guard"]


class Guard:
    """Checks every request. One per server."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._access: dict[Any, Access] = {}

    def protect(self, access: Mapping[Any, Access]) -> None:
        """Tell who may use which of aiohttp's route objects; a route that is not named here answers nobody."""
        self._access.update(access)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse, or say who is asking and go on."""
        route = request.match_info.route
        access = self._access.get(route)
        if access is None:
            # No such path, or no such method there: aiohttp's own answer, which tells nothing else.
            return await handler(request) if request.match_info.http_exception is not None else error_response(404, "not found")
        refusal = self._refusal(request, access)
        if refusal is not None:
            return refusal
        set_principal(request, ANONYMOUS)
        return await handler(request)

    def _refusal(self, request: web.Request, access: Access) -> web.Response | None:
        if access is Access.PUBLIC:
            return None
        if not self._host_allowed(request.host):
            return error_response(403, "this Host is not served here; start with --allowed-host to allow it")
        origin = request.headers.get("Origin")
        if origin is not None and not self._origin_allowed(origin, request.host):
            return error_response(403, "this Origin is not allowed; start with --allowed-origin to allow it")
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

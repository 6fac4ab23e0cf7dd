"""Proofs of who is asking: an API key in `Authorization`, or a ticket. Never a cookie, never a key in a URL."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from aiohttp import hdrs, web

from streamkv.errors import UnauthorizedError
from streamkv.server.keys import KeyStore
from streamkv.server.principal import Principal
from streamkv.server.tickets import Tickets

__all__ = ["TICKET_PREFIX", "Authenticator"]

TICKET_PREFIX: Final = "streamkv.ticket."
"""A browser can send a ticket as one more subprotocol; it is never chosen, so never echoed."""

_LONGEST: Final = 512


class Authenticator:
    """Keys and tickets of one server."""

    def __init__(self, keys: KeyStore, nobody: Principal, clock: Callable[[], float] = time.monotonic) -> None:
        """``nobody`` is who everybody is on a server without keys."""
        self.keys = keys
        self.tickets = Tickets()
        self._nobody = nobody
        self._clock = clock

    @property
    def required(self) -> bool:
        """True if a proof is needed."""
        return self.keys.required

    def of_header(self, request: web.Request) -> Principal | None:
        """Whose key the request has; None if it has none.

        Raises:
            UnauthorizedError: it has one that is not valid, or something else in its place.
        """
        if not self.required:
            return self._nobody  # whatever key a client has been set up with
        headers = request.headers.getall(hdrs.AUTHORIZATION, [])
        if not headers:
            return None
        scheme, _, key = headers[0].partition(" ")
        if len(headers) > 1 or scheme.lower() != "bearer" or not 0 < len(key) <= _LONGEST:
            raise UnauthorizedError("send one header Authorization: Bearer KEY")
        principal = self.keys.ring.find(key)
        if principal is None:
            raise UnauthorizedError("this API key is not valid here")
        return principal

    def of_upgrade(self, request: web.Request) -> Principal | None:
        """As `of_header`, or by a ticket, which is used up by it.

        Raises:
            UnauthorizedError: as `of_header`; an unknown, used or old ticket.
        """
        principal = self.of_header(request)
        if principal is not None:
            return principal
        tickets = _tickets(request)
        if not tickets:
            return None
        principal = self._redeem(tickets[0]) if len(tickets) == 1 else None
        if principal is None:
            raise UnauthorizedError("this ticket is unknown, used or too old; ask POST /v1/ws-tickets for a new one")
        return principal

    def of_token(self, token: str | None) -> Principal | None:
        """Who proves it by a token in a first frame: a key or a ticket; None if nobody."""
        if not self.required:
            return self._nobody
        if not token or len(token) > _LONGEST:
            return None
        return self.keys.ring.find(token) or self._redeem(token)

    def still_valid(self, principal: Principal) -> bool:
        """False once the key that proved it has been revoked."""
        return not self.required or self.keys.ring.still_valid(principal)

    def issue_ticket(self, principal: Principal) -> str:
        """A ticket for this tenant.

        Raises:
            RateLimitedError: it has too many out.
        """
        return self.tickets.issue(principal, self._clock())

    def _redeem(self, ticket: str) -> Principal | None:
        principal = self.tickets.redeem(ticket, self._clock())
        return principal if principal is not None and self.still_valid(principal) else None


def _tickets(request: web.Request) -> list[str]:
    offered = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, []))
    names = (name.strip() for name in offered.split(","))
    return request.query.getall("ticket", []) + [
        name.removeprefix(TICKET_PREFIX) for name in names if name.startswith(TICKET_PREFIX)
    ]

"""Tickets for browsers, which cannot send headers with a WebSocket: good for one upgrade, for half a minute. Pure."""

from __future__ import annotations

import hashlib
import secrets
from typing import Final, NamedTuple

from streamkv.errors import RateLimitedError
from streamkv.server.principal import Principal

__all__ = ["TICKET_S", "Tickets"]

TICKET_S: Final = 30.0
_MAX_PER_TENANT: Final = 1024


class _Issued(NamedTuple):
    principal: Principal
    expires: float


class Tickets:
    """Those that are out. Time is an argument, in seconds, and must not go back."""

    def __init__(self) -> None:
        self._issued: dict[bytes, _Issued] = {}  # by digest, oldest first
        self._count: dict[str, int] = {}  # of each tenant

    def __len__(self) -> int:
        return len(self._issued)

    def issue(self, principal: Principal, now: float) -> str:
        """A new ticket, of letters that may stand in a URL and in a subprotocol's name.

        Raises:
            RateLimitedError: the tenant has too many out.
        """
        self.expire(now)
        count = self._count.get(principal.tenant, 0)
        if count >= _MAX_PER_TENANT:
            oldest = next(issued for issued in self._issued.values() if issued.principal.tenant == principal.tenant)
            raise RateLimitedError(
                f"{count} tickets are waiting to be used already; use those first", retry_after_s=oldest.expires - now
            )
        ticket = secrets.token_urlsafe(32)
        self._issued[_digest(ticket)] = _Issued(principal, now + TICKET_S)
        self._count[principal.tenant] = count + 1
        return ticket

    def redeem(self, ticket: str, now: float) -> Principal | None:
        """Whose ticket it is, once; None if it is unknown, used or too old."""
        self.expire(now)
        # Found by digest: how long the search takes tells nothing about the tickets that are out.
        issued = self._issued.pop(_digest(ticket), None)
        if issued is None:
            return None
        self._forget(issued)
        return issued.principal

    def expire(self, now: float) -> None:
        """Forget those that are too old."""
        while self._issued:
            oldest = next(iter(self._issued))
            if self._issued[oldest].expires > now:
                break
            self._forget(self._issued.pop(oldest))

    def _forget(self, issued: _Issued) -> None:
        tenant = issued.principal.tenant
        self._count[tenant] -= 1
        if not self._count[tenant]:
            del self._count[tenant]


def _digest(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode("utf-8", "surrogateescape")).digest()

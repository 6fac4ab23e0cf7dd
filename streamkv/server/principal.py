"""Who is asking. Made by the guard, read by everything behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import web

from streamkv.server.limits import UNLIMITED, Quota

__all__ = ["ANONYMOUS", "OPERATOR", "Principal", "is_known", "principal_of", "set_principal"]


@dataclass(frozen=True, slots=True)
class Principal:
    """A tenant, as one of its keys proved it.

    Attributes:
        tenant: its name; "" = nobody in particular, on a server without keys.
        is_admin: may use admin routes.
        key: short name of the key, for revocation and logs; "" = there was none. Tells nothing about the key itself.
        quota: what its tenant may use.
    """

    tenant: str = ""
    is_admin: bool = False
    key: str = ""
    quota: Quota = UNLIMITED

    @property
    def salt(self) -> str:
        """Isolates its blocks in the prefix cache: nobody learns from timing what another tenant has asked."""
        return self.tenant

    def salt_with(self, cache_salt: str | None) -> str:
        """The client's own division of its tenant's cache; it can never name another tenant's."""
        # NUL is in no tenant's name, so that no pair reads as another one.
        return self.salt if cache_salt is None else f"{self.salt}\0{cache_salt}"


ANONYMOUS: Final = Principal()
"""Everybody, on a server that other machines reach and that was told to ask for no keys."""

OPERATOR: Final = Principal(is_admin=True)
"""Everybody, on a server without keys that only this machine reaches: who can connect is whoever runs it."""

_KEY: Final = web.RequestKey("principal", Principal)


def set_principal(request: web.Request, principal: Principal) -> None:
    """Called by the guard, once it knows."""
    request[_KEY] = principal


def is_known(request: web.Request) -> bool:
    """False for a WebSocket that has yet to prove in its first frame who it is."""
    return _KEY in request


def principal_of(request: web.Request) -> Principal:
    """Who sent this request; the guard has let it through.

    Raises:
        KeyError: a WebSocket that has not proved yet who it is; there is nobody to act for.
    """
    return request[_KEY]

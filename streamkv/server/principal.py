"""Who is asking. Made by the guard, read by everything behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import web

__all__ = ["ANONYMOUS", "Principal", "principal_of", "set_principal"]

@dataclass(frozen=True, slots=True)
class Principal:
    """A tenant.

    Attributes:
        tenant: its name; "" = nobody in particular, on a server without keys.
        is_admin: may use admin routes.
    """

    tenant: str = ""
    is_admin: bool = False

    @property
    def salt(self) -> str:
        """Isolates its blocks in the prefix cache: nobody learns from timing what another tenant has asked."""
        return self.tenant


ANONYMOUS: Final = Principal()

_KEY: Final = web.RequestKey("principal", Principal)


def set_principal(request: web.Request, principal: Principal) -> None:
    """Called by the guard, once it knows."""
    request[_KEY] = principal


def principal_of(request: web.Request) -> Principal:
    """Who sent this request; the guard has let it through."""
    return request[_KEY]

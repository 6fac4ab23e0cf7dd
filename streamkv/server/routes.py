"""What the server answers: a table of routes, each with who may use it. Nothing is reachable that is not in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from aiohttp import web

from streamkv.errors import StreamKVError

__all__ = ["ERROR_CODE", "Access", "Door", "Handler", "Route", "error_response"]

ERROR_CODE: Final = web.ResponseKey("error_code", str)
"""On an answer that is an error: its code, for the log."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access(Enum):
    """Who may use a route. It belongs to the route itself and is never told from a path."""

    PUBLIC = "public"
    """Everybody: health, page assets."""
    CLIENT = "client"
    """Whoever has a key."""
    ADMIN = "admin"
    """Whoever has an admin's key."""
    UPGRADE = "upgrade"
    """A WebSocket: a key, or a ticket, or a token in its first frame."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path."""

    method: str
    path: str
    handler: Handler
    access: Access


class Door(Protocol):
    """A part of the server with routes of its own and work in progress that a shutdown must wait for."""

    def routes(self) -> list[Route]:
        """What it answers."""

    def drain(self, deadline_s: float, reason: str) -> None:
        """Take nothing new; what runs may go on for so many seconds."""

    @property
    def idle(self) -> bool:
        """True if nothing is in progress."""

    def close(self, reason: str) -> None:
        """End what is still in progress."""

    @property
    def closed(self) -> bool:
        """True once nothing of it is left."""


def error_response(
    status: int, message: str, *, code: str = "invalid_request", param: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """An error in OpenAI's form; `code` is one of the protocol's."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    response = web.json_response(body, status=status, headers=headers)
    response[ERROR_CODE] = code
    return response


def status_of(error: StreamKVError) -> int:
    """HTTP status of an error that is raised on purpose."""
    return {
        "unauthorized": 401,
        "model_not_found": 404,
        "overloaded": 429,
        "rate_limited": 429,
        "draining": 503,
        "engine_lost": 503,
        "out_of_memory": 503,
        "internal": 500,
        "numerical_error": 500,
        "deadline_exceeded": 504,
    }.get(error.code, 400)

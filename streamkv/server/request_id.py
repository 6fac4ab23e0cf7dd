"""What a request is called, in its answer and in the log."""

from __future__ import annotations

import re
import secrets
from typing import Final

import structlog
from aiohttp import web

from streamkv.server.routes import ERROR_CODE

__all__ = ["REQUEST_ID", "log_failed", "request_id"]

REQUEST_ID: Final = "X-Request-Id"

_LOGGABLE: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_KEY: Final = web.RequestKey("request_id", str)

log = structlog.get_logger(__name__)


def request_id(request: web.BaseRequest) -> str:
    """The client's own `X-Request-Id` if it is one that can be echoed and logged, else a new one; the same at every call."""
    known: str | None = request.get(_KEY)
    if known is None:
        given = request.headers.get(REQUEST_ID, "")
        known = request[_KEY] = given if _LOGGABLE.fullmatch(given) else secrets.token_hex(12)
    return known


def log_failed(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """The one line of a request that is answered with an error."""
    log.info(
        "request_failed",
        rid=request_id(request),
        status=response.status,
        code=response.get(ERROR_CODE),
        method=request.method,  # but no path: it is the client's own words, and a ticket may be among them
        peer=request.remote,
    )

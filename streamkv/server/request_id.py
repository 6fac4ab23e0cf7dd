"""What a request is called, in its answer and in the log."""

from __future__ import annotations

import re
import secrets
from typing import Final

import structlog
from aiohttp import web

from streamkv.observe.context import read_traceparent, trace_id
from streamkv.server.routes import ERROR_CODE

__all__ = ["REQUEST_ID", "about", "log_failed", "request_id"]

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


def about(request: web.BaseRequest) -> dict[str, str]:
    """Names for each line of its in the log: `rid`, and `trace_id` if the client has named a trace."""
    # From its own header: the task's context is that of the request before, if this one was too broken to be routed.
    trace = trace_id(read_traceparent(request.headers.get("traceparent")))
    return {"rid": request_id(request)} if trace is None else {"rid": request_id(request), "trace_id": trace}


def log_failed(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """The one line of a request that is answered with an error."""
    log.info(
        "request_failed",
        **about(request),
        status=response.status,
        code=response.get(ERROR_CODE),
        method=request.method,  # but no path: it is the client's own words, and a ticket may be among them
        peer=request.remote,
    )

"""What the task that opens a stream knows about its request and `TextStreams` does not; only traces ask."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

__all__ = ["OPERATION", "TRACEPARENT", "read_traceparent", "trace_id"]

_FORMAT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)

TRACEPARENT: Final[ContextVar[str | None]] = ContextVar("streamkv_traceparent", default=None)
"""W3C trace context of the request, or of the connection that it came on; always one that can be read."""

OPERATION: Final[ContextVar[str]] = ContextVar("streamkv_operation", default="text_completion")
"""`gen_ai.operation.name`: chat, text_completion, embeddings."""


def read_traceparent(given: str | None) -> str | None:
    """The span that a client names, in the form of version 00, or None if it names none.

    As https://www.w3.org/TR/trace-context/ wants it: what cannot be read is ignored, and of a later version as much is read as
    version 00 has.
    """
    found = _FORMAT.fullmatch(given or "")
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5] is not None):
        return None
    if found[2] == "0" * 32 or found[3] == "0" * 16:
        return None
    return f"00-{found[2]}-{found[3]}-{found[4]}"


def trace_id(traceparent: str | None) -> str | None:
    """Name of the whole trace, for the log."""
    return None if traceparent is None else traceparent[3:35]

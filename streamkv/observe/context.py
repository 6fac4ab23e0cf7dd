"""What the task that opens a stream knows about its request and `TextStreams` does not; only traces ask."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

__all__ = ["OPERATION", "TRACEPARENT"]

TRACEPARENT: Final[ContextVar[str | None]] = ContextVar("streamkv_traceparent", default=None)
"""W3C trace context of the request that opened the connection, as it came."""

OPERATION: Final[ContextVar[str]] = ContextVar("streamkv_operation", default="text_completion")
"""`gen_ai.operation.name`: chat, text_completion, embeddings."""

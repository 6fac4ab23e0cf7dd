"""structlog, set up once at the edge of a process.

Lines carry whose they are: what is bound with `structlog.contextvars` (`conn`, `session`, `rid`, `stream`, `tenant`) in a task
is in every line that the task, and the tasks it starts afterwards, write. What users have said and what the model answers are
never logged, nor keys: `withheld` is a second lock on that door. There is no line per token.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import msgspec
import structlog

__all__ = ["WITHHELD", "configure_logs", "withheld"]

WITHHELD: Final = frozenset(
    {
        *("prompt_text", "prompts", "message", "messages", "text", "content", "body", "input", "output", "delta"),
        *("token_ids", "ids", "token", "ticket", "key", "api_key", "authorization", "cookie", "password", "secret"),
    }
)
"""Names under which something could be logged that must not be."""

_LONGEST: Final = 2000


def withheld(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor: what stands under such a name is not written, and nothing is longer than a screen."""
    for name, value in event.items():
        if name in WITHHELD:
            event[name] = "[withheld]"
        elif isinstance(value, str) and len(value) > _LONGEST and name != "exception":
            event[name] = value[:_LONGEST] + "..."
    return event


def _json(event: MutableMapping[str, Any], **_options: object) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


def configure_logs(*, json: bool = False, level: str = "info") -> None:
    """Log to standard error, one line an event: for people, or as JSON."""
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        withheld,
    ]
    # Tracebacks without the values of local variables: they hold prompts.
    if json:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
        processors += [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer(serializer=_json)]
    else:
        plain = structlog.dev.plain_traceback
        processors += [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer) if json else structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

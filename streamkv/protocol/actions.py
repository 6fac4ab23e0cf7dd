"""What a session wants done outside: its only way to reach the engine and the socket. The shell carries these out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamkv.protocol.bodies import Parsed

__all__ = ["Action", "CancelStream", "Close", "ForkOf", "GrantCredit", "OpenStreams"]


@dataclass(frozen=True, slots=True)
class ForkOf:
    """What a fork goes on from.

    Attributes:
        record: of the parent, as the shell gave it to `Session.opened`.
        output: the parent's own output tokens that the fork keeps.
        chars: characters of the parent's text that the client has of them; None = not known, so that nothing is said twice.
        added: text or messages that follow, or None.
    """

    record: Any
    output: tuple[int, ...]
    chars: int | None
    added: Any


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Prepare and submit: one prompt, or one input per stream; answer for each with `Session.opened` or `Session.refused`.

    Attributes:
        keys: names of the streams between session and shell, never used twice; a client may give an id a second life.
        credit: output tokens that the client accepts; None = no limit.
        traceparent: as it came.
    """

    keys: tuple[str, ...]
    body: Parsed
    priority: int
    credit: int | None = None
    fork: ForkOf | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """The client accepts so many output tokens of this stream."""

    key: str
    limit: int


@dataclass(frozen=True, slots=True)
class CancelStream:
    """Cancel what runs under this key."""

    key: str


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is pending, then close the socket with this code. The reason begins with a word for machines."""

    code: int
    reason: str


Action = OpenStreams | GrantCredit | CancelStream | Close

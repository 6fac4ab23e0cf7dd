"""Time that a stream loses after it has started: without its blocks, or without credit."""

from __future__ import annotations

from typing import Literal

__all__ = ["Waits"]


class Waits:
    """Measured from the output that says so to the stream's next token, so that recomputing counts as lost too.

    A stream that is preempted while it has no credit waits for its reader: that time is `stalled` and no part of `preempted`.

    Attributes:
        preemptions: how often it lost its blocks.
        preempted, stalled: seconds.
        kind: what it waits for now; None = it is under way.
    """

    __slots__ = ("_since", "kind", "preempted", "preemptions", "stalled")

    def __init__(self) -> None:
        self.preemptions = 0
        self.preempted = self.stalled = 0.0
        self.kind: Literal["preempted", "stalled"] | None = None
        self._since = 0.0

    def begin(self, kind: Literal["preempted", "stalled"], now: float) -> None:
        """It gets no further now."""
        self.preemptions += kind == "preempted"
        if self.kind is None:
            self.kind, self._since = kind, now

    def end(self, now: float) -> None:
        """Its next token is there, or it has ended."""
        if self.kind == "preempted":
            self.preempted += now - self._since
        elif self.kind == "stalled":
            self.stalled += now - self._since
        self.kind = None

"""How late the event loop runs what is due: the one figure that tells a slow server from a slow model."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from streamkv.observe.exposition import Histogram, quantile

__all__ = ["LoopLag", "Mark"]

_TICK_S: Final = 0.02
_BOUNDS: Final = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)


class Mark(NamedTuple):
    """The counts at a moment of the loop's clock."""

    at: float
    counts: tuple[int, ...]


class LoopLag:
    """Asks the loop for a call every 20 ms and writes down how late it came.

    A stream's own share is the difference of the counts at its end and at its start, so that nothing is kept per stream and tick.
    """

    def __init__(self) -> None:
        """Nothing is measured before `start`."""
        self.histogram = Histogram("loop_lag_seconds", "How late the event loop ran a call that was due.", _BOUNDS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        """Measure the running loop."""
        self._loop = asyncio.get_running_loop()
        self._arm()

    def stop(self) -> None:
        """No more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop = self._timer = None

    def _arm(self) -> None:
        assert self._loop is not None
        self._due = self._loop.time() + _TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        if self._loop is not None:
            self.histogram.observe(max(0.0, self._loop.time() - self._due))
            self._arm()

    def mark(self) -> Mark:
        """The beginning of a span of time."""
        return Mark(self._loop.time() if self._loop is not None else 0.0, tuple(self.histogram.counts))

    def since(self, mark: Mark, q: float = 0.99) -> float:
        """A quantile of the lag since `mark`, a call that is overdue right now included; 0 if nothing was measured."""
        spent = [now - then for now, then in zip(self.histogram.counts, mark.counts, strict=True)]
        overdue = 0.0
        if self._loop is not None:
            now = self._loop.time()
            overdue = min(now - self._due, now - mark.at)
        return max(quantile(_BOUNDS, spent, q) or 0.0, overdue)

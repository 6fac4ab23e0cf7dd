"""Measured rates and means that forget the distant past. Pure; time is an argument."""

from __future__ import annotations

import math
from typing import Final

__all__ = ["Mean", "Rate"]

_MEMORY_S: Final = 10.0
_LEAST_S: Final = 0.05
"""Less than this much work is no measurement."""


class Rate:
    """Units per second of the time in which there was work; seconds long past count less and less."""

    __slots__ = ("_amount", "_at", "_seconds", "_since")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0  # both with the weight that their time has now
        self._since = 0.0  # seconds of work since the last amount
        self._at: float | None = None  # until when it has been counted; None = there is no work

    def busy(self, now: float) -> None:
        """There is work from now on."""
        if self._at is None:
            self._at = now

    def idle(self, now: float) -> None:
        """There is none any more."""
        self._advance(now)
        self._at = None

    def add(self, amount: float, now: float) -> None:
        """So much has been done since the last time."""
        self._advance(now)
        # Done little by little: it weighs what those seconds weigh, however long ago they began.
        self._amount += amount * (_weight(self._since) / self._since if self._since > 0 else 1.0)
        self._since = 0.0

    def per_second(self, now: float) -> float | None:
        """The rate; None as long as too little has been seen."""
        self._advance(now)
        if not self._amount or self._seconds < _LEAST_S:
            return None
        return self._amount / self._seconds

    def _advance(self, now: float) -> None:
        if self._at is None or now <= self._at:
            return
        elapsed, self._at = now - self._at, now
        kept = math.exp(-elapsed / _MEMORY_S)
        self._amount *= kept
        self._seconds = self._seconds * kept + _weight(elapsed)
        self._since += elapsed


def _weight(seconds: float) -> float:
    """Of the last so many seconds together."""
    return _MEMORY_S * (1.0 - math.exp(-seconds / _MEMORY_S))


class Mean:
    """Exponentially weighted: the last twenty or so values count."""

    __slots__ = ("value",)

    def __init__(self, first_guess: float) -> None:
        self.value = first_guess

    def add(self, value: float) -> None:
        """One more."""
        self.value += 0.05 * (value - self.value)

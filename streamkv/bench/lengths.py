"""Lengths by their percentiles: what a trace's prompts and answers measure, without a formula that would miss their humps."""

from __future__ import annotations

from bisect import bisect_right
from random import Random
from typing import Final

__all__ = ["PERCENTILES", "Table", "scaled"]

PERCENTILES: Final = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)


class Table:
    """An inverse distribution function: log-linear between the percentiles that are given.

    Args:
        values: tokens (or seconds) at `percentiles`, not decreasing, all above 0.
    """

    def __init__(self, *values: float, percentiles: tuple[float, ...] = PERCENTILES) -> None:
        if len(values) != len(percentiles) or list(values) != sorted(values) or values[0] <= 0:
            raise ValueError("give one positive value for every percentile, in ascending order")
        self._values = values
        self._shares = tuple(percentile / 100 for percentile in percentiles)

    def at(self, share: float) -> float:
        """The value that this share (0..1) of all do not exceed."""
        index = min(bisect_right(self._shares, share), len(self._shares) - 1)
        low, high = self._values[index - 1], self._values[index]
        part = (share - self._shares[index - 1]) / (self._shares[index] - self._shares[index - 1])
        return low * float((high / low) ** part)

    def draw(self, source: Random) -> float:
        """One value."""
        return self.at(source.random())


def scaled(length: float, scale: int) -> int:
    """Whole tokens, at least one."""
    return max(1, round(length / scale))

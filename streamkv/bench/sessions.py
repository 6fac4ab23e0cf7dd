"""Conversations: which request goes on where an earlier one has ended.

A request's length is drawn first, so that all lengths together are as in the trace; then a partner is looked for among those
that came about one gap ago: the one whose prompt is nearest to what this one has in common with it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from random import Random
from typing import Final

from streamkv.bench.lengths import Table
from streamkv.bench.trace import BLOCK

__all__ = ["Habit", "Sessions"]

_NEIGHBOURS: Final = 64
"""Partners that are looked at on each side of the wanted moment."""


@dataclass(frozen=True)
class Habit:
    """How requests go on from each other.

    Attributes:
        follows: share of requests that do, by tenth of the prompt's length: longer ones do more often.
        gap: seconds from a request to what follows it.
        new: tokens of a following prompt that the earlier one has not.
        common: blocks that all prompts begin with.
    """

    follows: tuple[float, ...]
    gap: Table
    new: Table
    common: int = 0


@dataclass
class Sessions:
    """Gives prompts their blocks."""

    habit: Habit
    _times: list[float] = field(default_factory=list)
    _ends: list[tuple[int, ...]] = field(default_factory=list)  # the prompt of each
    _next: int = 0

    def blocks(self, at: float, tokens: int, share: float, source: Random) -> tuple[int, ...]:
        """Hash ids of a prompt.

        Args:
            at: seconds; not earlier than the request before.
            share: of prompts that are not longer (0..1).
        """
        count = -(-tokens // BLOCK)
        tenth = min(int(share * len(self.habit.follows)), len(self.habit.follows) - 1)
        common = tuple(range(min(self.habit.common, count)))
        ids = self._following(at, tokens, source) if source.random() < self.habit.follows[tenth] else common
        fresh = count - len(ids)
        ids += tuple(range(self.habit.common + self._next, self.habit.common + self._next + fresh))
        self._next += fresh
        self._times.append(at)
        self._ends.append(ids)
        return ids

    def _following(self, at: float, tokens: int, source: Random) -> tuple[int, ...]:
        """What it shares with an earlier prompt, which nobody goes on from any more then."""
        wanted = int(max(0.0, tokens - self.habit.new.draw(source)) // BLOCK)
        middle = bisect_left(self._times, at - self.habit.gap.draw(source))
        near = range(max(0, middle - _NEIGHBOURS), min(len(self._ends), middle + _NEIGHBOURS))
        if wanted <= self.habit.common or not near:
            return tuple(range(min(self.habit.common, -(-tokens // BLOCK))))
        best = min(near, key=lambda index: _misfit(len(self._ends[index]), wanted))
        shared = self._ends[best][:wanted]
        del self._times[best], self._ends[best]
        return shared


def _misfit(has: int, wanted: int) -> int:
    """Too short costs hits, too long makes a branch, which is not rare."""
    return 2 * (wanted - has) if has < wanted else has - wanted

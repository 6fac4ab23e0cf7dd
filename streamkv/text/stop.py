"""Stop strings over streamed text: never leaked, and never more held back than could still become one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first stop string to complete, however the text is cut into pieces.

    A push costs its own text plus at most the longest stop string squared, however long the text already is.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Take the strings to look for.

        Args:
            stops: non-empty strings.
            include: the text ends with the stop string instead of before it.
        """
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, text: str, *, armed: bool = True) -> str:
        """Text that can be released now; `stopped` is set once a stop string has completed, and nothing follows it.

        Args:
            armed: False while the text may not end yet. A stop string counts if its last character comes with an armed push;
                one that completes before is text like any other, and its end may be the beginning of one that counts.
        """
        if not self._stops:
            return text
        if self.stopped:
            return ""
        before, text = len(self._held), self._held + text
        cut = self._first_end(text, before) if armed else None
        if cut is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        keep = self._hold_from(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The rest: what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_end(self, text: str, before: int) -> int | None:
        """Where the text ends, if a stop string completes after `before`.

        The first to complete wins, so that the result does not depend on how the text is cut; of two, the longer.
        """
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if not found:
            return None
        end, start = min(found)
        return end if self._include else start

    def _hold_from(self, text: str) -> int:
        """Start of the longest suffix that is a proper prefix of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                suffix = text[start:]
                if any(len(suffix) < len(stop) and stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(text)

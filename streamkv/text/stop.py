"""Stop strings over streamed text: never leaked, and never more held back than could still become one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first stop string to complete, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: non-empty strings."""
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that can be released now; `stopped` is set once a stop string has completed, and nothing follows it."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        # The first to complete wins, so that the result does not depend on where the text is cut; of two, the longer.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = self._hold_from(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The rest: what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, text: str) -> int:
        """Start of the longest suffix that is a proper prefix of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                suffix = text[start:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(text)

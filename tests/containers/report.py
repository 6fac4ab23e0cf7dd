"""What was checked, as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["NotCheckedError", "Report", "until"]


class NotCheckedError(Exception):
    """Something that the check needs is not here."""


class Report:
    """Rows in the order of checking."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] = []

    @contextmanager
    def row(self, what: str) -> Iterator[list[str]]:
        """One check. What the block appends to the list stands beside the verdict; an exception is a failure of this row only."""
        print(f"... {what}", flush=True)
        notes: list[str] = []
        verdict = "passed"
        try:
            yield notes
        except NotCheckedError as missing:
            verdict, notes = "skipped", [str(missing)]
        except Exception as error:  # whatever it is, it is this row's verdict, and the next rows are checked as well
            verdict, notes = "failed", [*notes, f"{type(error).__name__}: {error}"]
        self._rows.append((what, verdict, "; ".join(notes)))
        print(f"    {verdict}: {'; '.join(notes)}", flush=True)

    def count(self, verdict: str) -> int:
        """How many rows came out so."""
        return sum(row[1] == verdict for row in self._rows)

    def table(self) -> str:
        """Markdown, and the sum in a line of its own."""
        lines = ["| what | verdict | |", "|---|---|---|"]
        lines += [f"| {what} | {verdict} | {' '.join(notes.split())[:300]} |" for what, verdict, notes in self._rows]
        return "\n".join(lines)


def until(what: str, limit_s: float, reached: Callable[[], bool]) -> float:
    """Ask again and again; how many seconds it took.

    Raises:
        AssertionError: it was not reached in time.
    """
    begin = time.monotonic()
    while not reached():
        assert time.monotonic() - begin < limit_s, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.2)
    return time.monotonic() - begin

"""Counters, gauges and histograms, and Prometheus' text format (version 0.0.4) of them.

Not `prometheus_client`, which is well kept: its histogram takes one value at a time, under a lock, through a linear search of
the buckets, and here 500 streams get their next token at the same moment, with the same time since the last one, on one
thread. `observe(value, count)` books all of them at once (docs/observability.md has the figures).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

__all__ = ["CONTENT_TYPE", "Counter", "Family", "Gauge", "Histogram", "Summary", "exposition", "quantile"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Family:
    """One metric. `name` has no prefix; `labels` are the names of those that each sample has besides the common ones."""

    kind = ""

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = labels

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """(suffix of the name, labels, value)."""
        raise NotImplementedError


class _Valued(Family):
    """One number for each combination of labels; without labels there is a number from the start."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = (), known: Iterable[tuple[str, ...]] = ()) -> None:
        """`known`: combinations that are shown before anything is counted, so that a rate over them has a beginning."""
        super().__init__(name, text, labels)
        self.values: dict[tuple[str, ...], float] = dict.fromkeys(known if labels else [()], 0.0)

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """One each."""
        for labels, value in self.values.items():
            yield "", tuple(zip(self.labels, labels, strict=True)), value


class Counter(_Valued):
    """Only ever grows."""

    kind = "counter"

    def add(self, amount: float = 1.0, *labels: str) -> None:
        """Count so many more."""
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def reached(self, total: float, *labels: str) -> None:
        """Take over a count that is kept elsewhere."""
        self.values[labels] = total


class Gauge(_Valued):
    """Goes up and down."""

    kind = "gauge"

    def set(self, value: float, *labels: str) -> None:
        """It is so much now."""
        self.values[labels] = value

    def add(self, amount: float, *labels: str) -> None:
        """It is so much more, or less, than before."""
        self.values[labels] = self.values.get(labels, 0.0) + amount


class Summary(Family):
    """Sum and number of what was observed, for each combination of labels."""

    kind = "summary"

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        super().__init__(name, text, labels)
        self.values: dict[tuple[str, ...], tuple[float, int]] = {}

    def observe(self, value: float, *labels: str) -> None:
        """One more."""
        total, count = self.values.get(labels, (0.0, 0))
        self.values[labels] = total + value, count + 1

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Two each."""
        for labels, (total, count) in self.values.items():
            pairs = tuple(zip(self.labels, labels, strict=True))
            yield "_sum", pairs, total
            yield "_count", pairs, count


class Histogram(Family):
    """Counts per bucket.

    Attributes:
        bounds: upper bounds, included; one bucket more takes what is larger.
        counts: of each bucket alone, not cumulated.
    """

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        super().__init__(name, text)
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Cumulated, as a scrape wants them."""
        total = 0
        for bound, count in zip([*map(_number, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield "_bucket", (("le", bound),), total
        yield "_sum", (), self.sum
        yield "_count", (), total


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """The value below which a share `q` lies, interpolated within its bucket as Prometheus does; None without a value.

    What lies beyond the last bound is said to be at it.
    """
    rank = q * sum(counts)
    if not rank:
        return None
    below, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        below, low = below + count, bound
    return bounds[-1]


def exposition(families: Iterable[tuple[str, Family, Labels]]) -> str:
    """(full name, metric, common labels) of each, as a scrape wants it."""
    lines: list[str] = []
    for name, family, common in families:
        lines += [f"# HELP {name} {family.text}", f"# TYPE {name} {family.kind}"]
        for suffix, labels, value in family.samples():
            pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in (*common, *labels))
            lines.append(f"{name}{suffix}{{{pairs}}} {_number(value)}" if pairs else f"{name}{suffix} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(float(value))

"""Bars and curves as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Bar", "Bars", "bars", "curves", "line", "page"]

_COLOURS: Final = ("#3b6fb6", "#c25b3f", "#4b8b57", "#8a5fa8", "#b08a2e", "#5b8f9a", "#8f5b6b", "#777777")
_WIDTH: Final = 760
_LABELS: Final = 260
_ROW: Final = 20
_HEIGHT: Final = 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 56, 48


@dataclass(frozen=True)
class Bar:
    """A value and the range that it is the median of."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """Bars on one scale; `limit` is drawn as a line."""

    title: str
    unit: str
    rows: Sequence[Bar]
    limit: float | None = None


def bars(title: str, groups: Sequence[Bars]) -> str:
    """Groups of horizontal bars, one below the other, each on its own scale that begins at 0."""
    parts: list[str] = []
    top = 40.0
    for group in groups:
        parts.append(f'<text x="8" y="{top + 14:.0f}" font-weight="bold">{escape(group.title)}</text>')
        top += 22
        scale = (_WIDTH - _LABELS - 80) / max([row.high for row in group.rows] + [group.limit or 0.0, 1e-9])
        for index, row in enumerate(group.rows):
            parts += _bar(row, top + _ROW * index, scale, _COLOURS[0] if row.label.startswith("StreamKV") else "#b9c3cf")
        bottom = top + _ROW * len(group.rows)
        if group.limit is not None:
            at = _LABELS + group.limit * scale
            parts.append(line(at, top, at, bottom, "#c25b3f", "4 3"))
            parts.append(
                f'<text x="{at + 4:.1f}" y="{bottom + 10:.0f}" fill="#c25b3f">limit {group.limit:,.0f} {group.unit}</text>'
            )
        top = bottom + 20
    return page(title, int(top) + 8, parts)


def _bar(row: Bar, y: float, scale: float, colour: str) -> list[str]:
    middle, length = y + _ROW / 2, row.value * scale
    return [
        f'<text x="{_LABELS - 6}" y="{middle + 4:.0f}" text-anchor="end">{escape(row.label)}</text>',
        f'<rect x="{_LABELS}" y="{y + 3:.0f}" width="{length:.1f}" height="{_ROW - 6}" fill="{colour}"/>',
        line(_LABELS + row.low * scale, middle, _LABELS + row.high * scale, middle, "#333"),
        f'<text x="{_LABELS + max(length, row.high * scale) + 5:.1f}" y="{middle + 4:.0f}">{row.value:,.0f}</text>',
    ]


def curves(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]], *, limits: Sequence[str] = ()
) -> str:
    """Curves over logarithmic axes; those named in `limits` are dashed."""
    points = [point for each in series.values() for point in each]
    x, low_x, high_x = _axis([point[0] for point in points], _LEFT, _WIDTH - _RIGHT)
    y, low_y, high_y = _axis([point[1] for point in points], _HEIGHT - _BOTTOM, _TOP)
    parts: list[str] = []
    for value in _ticks(low_x, high_x):
        at = x(value)
        parts.append(line(at, _TOP, at, _HEIGHT - _BOTTOM, "#e4e4e4"))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>')
    for value in _ticks(low_y, high_y):
        at = y(value)
        parts.append(line(_LEFT, at, _WIDTH - _RIGHT, at, "#e4e4e4"))
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 8}">{escape(y_label)}</text>')
    solid = [name for name in series if name not in limits]
    for index, (name, each) in enumerate(series.items()):
        colour = _COLOURS[(solid.index(name) if name in solid else list(limits).index(name)) % len(_COLOURS)]
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in each)
        dash = ' stroke-dasharray="5 4"' if name in limits else ""
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{path}"/>')
        parts += [f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>' for at, value in each if not dash]
        parts.append(
            f'<text x="{_WIDTH - _RIGHT - 8}" y="{_TOP + 16 + 16 * index}" text-anchor="end" fill="{colour}">'
            f"{'- - ' if dash else ''}{escape(name)}</text>"
        )
    return page(title, _HEIGHT, parts)


class _Scale:
    """From a value to a place on a logarithmic axis."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self._low, self._begin = math.log(low), begin
        self._factor = (end - begin) / (math.log(high) - self._low)

    def __call__(self, value: float) -> float:
        return self._begin + (math.log(value) - self._low) * self._factor


def _axis(values: Sequence[float], begin: float, end: float) -> tuple[_Scale, float, float]:
    low, high = min(values) / 1.15, max(values) * 1.15
    return _Scale(low, high, begin, end), low, high


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten; powers alone if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    """A straight line as an SVG element."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def page(title: str, height: int, parts: Sequence[str]) -> str:
    """A whole SVG file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])

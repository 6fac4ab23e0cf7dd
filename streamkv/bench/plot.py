"""Distributions as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Final

__all__ = ["distributions"]

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 40, 44
_COLOURS: Final = ("#3b6fb6", "#c25b3f", "#4b8b57", "#8a5fa8")
_POINTS: Final = 200


def distributions(title: str, series: Mapping[str, Sequence[float]]) -> str:
    """For each series the share of values up to x; x in milliseconds on a logarithmic axis.

    Args:
        series: name -> seconds; those without a positive value are left out.
    """
    sets = {name: sorted(value * 1000 for value in values if value > 0) for name, values in series.items()}
    sets = {name: values for name, values in sets.items() if values}
    if not sets:
        return _page(title, ['<text x="50%" y="50%" text-anchor="middle">no request came to its end</text>'])
    low = math.floor(math.log10(min(values[0] for values in sets.values())))
    high = max(low + 1, math.ceil(math.log10(max(values[-1] for values in sets.values()))))

    def x(milliseconds: float) -> float:
        return _LEFT + (math.log10(milliseconds) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = _grid(low, high, x)
    for index, (name, values) in enumerate(sets.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{_line(values, x)}"/>')
        parts.append(f'<text x="{_LEFT + 8 + 190 * index}" y="34" fill="{colour}">{escape(name)}</text>')
    return _page(title, parts)


def _y(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _line(values: Sequence[float], x: Callable[[float], float]) -> str:
    count = min(_POINTS, len(values))
    shares = [(index + 1) / count for index in range(count)]
    return " ".join(f"{x(values[math.ceil(share * len(values)) - 1]):.1f},{_y(share):.1f}" for share in shares)


def _grid(low: int, high: int, x: Callable[[float], float]) -> list[str]:
    parts = []
    for share in (0.0, 0.5, 0.9, 0.99):
        parts.append(_stroke(_LEFT, _y(share), _WIDTH - _RIGHT, _y(share)))
        parts.append(f'<text x="{_LEFT - 6}" y="{_y(share) + 4:.1f}" text-anchor="end">{share * 100:.0f} %</text>')
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(_stroke(at, _TOP, at, _HEIGHT - _BOTTOM))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{10.0**power:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">milliseconds</text>')
    return parts


def _stroke(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _page(title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-size="14">{escape(title)}</text>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])

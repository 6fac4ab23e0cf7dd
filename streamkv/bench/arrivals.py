"""When requests come: endless seconds from the first request on, for `itertools.islice`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

__all__ = ["Arrivals", "gamma", "mmpp", "poisson"]

Arrivals = Callable[[Random], Iterator[float]]


def poisson(rate: float) -> Arrivals:
    """Independent of each other, `rate` a second."""
    return gamma(rate, 1.0)


def gamma(rate: float, shape: float) -> Arrivals:
    """Gaps are Gamma distributed with a coefficient of variation of 1 / sqrt(shape): below a shape of 1 they come in clusters."""

    def times(source: Random) -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += source.gammavariate(shape, 1 / (rate * shape))

    return times


def mmpp(rates: tuple[float, float], stays: tuple[float, float]) -> Arrivals:
    """A Markov-modulated Poisson process: two rates a second that take turns, for exponential times of these means in seconds."""

    def times(source: Random) -> Iterator[float]:
        yield 0.0
        now, state = 0.0, 0
        while True:
            until = now + source.expovariate(1 / stays[state])
            while rates[state] > 0 and (now := now + source.expovariate(rates[state])) < until:
                yield now
            now, state = until, 1 - state

    return times

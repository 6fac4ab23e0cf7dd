"""The statistic that R-TIMING is judged by, against values that are known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks are not there beside an installed wheel")


def test_the_distance_is_that_of_the_empirical_distributions():
    from benchmarks.timing_channel import kolmogorov_smirnov

    assert kolmogorov_smirnov([1, 2, 3, 4], [1, 2, 3, 4]) == (0.0, 1.0)
    assert kolmogorov_smirnov([1, 2, 3, 4], [5, 6])[0] == 1.0
    assert kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6, 7])[0] == pytest.approx(0.6)
    assert kolmogorov_smirnov([1, 1, 1, 2], [1, 2, 2, 2])[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("scaled", "p"), [(0.5, 0.9639), (0.8276, 0.5), (1.2238, 0.1), (1.3581, 0.05), (1.6276, 0.01)])
def test_the_tail_is_that_of_the_tables(scaled: float, p: float):
    """Kolmogorov's distribution at its usual critical values; samples so large that the correction does not matter."""
    from benchmarks.timing_channel import kolmogorov_smirnov

    n = 200_000
    shift = round(scaled / (n / 2) ** 0.5 * n)
    d, found = kolmogorov_smirnov(range(n), range(shift, n + shift))
    assert d == pytest.approx(shift / n)
    assert found == pytest.approx(p, abs=0.002)


def test_equal_sources_are_told_apart_as_often_as_p_says():
    from benchmarks.timing_channel import kolmogorov_smirnov

    source = random.Random(1)

    def sample(mean: float) -> list[float]:
        return [source.gauss(mean, 1.0) for _ in range(100)]

    alarms = sum(kolmogorov_smirnov(sample(0.0), sample(0.0))[1] < 0.05 for _ in range(400))
    assert 5 <= alarms <= 35
    assert all(kolmogorov_smirnov(sample(0.0), sample(1.0))[1] < 0.001 for _ in range(20))

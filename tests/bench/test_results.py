"""Figures of made-up requests, computed by hand."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest

from streamkv.bench.plot import distributions
from streamkv.bench.results import Outcome, Slo, Spread, percentile, summarise


def outcome(*arrivals: tuple[float, int], code: str = "ok", due: float = 10.0, ended: float = 12.0) -> Outcome:
    return Outcome(due, sent=due + 0.25, ended=ended, arrivals=list(arrivals), code=code, prompt_tokens=10, cached_tokens=4)


def test_one_request():
    one = outcome((10.5, 2), (10.9, 1), (11.5, 3))
    assert one.tokens == 6
    assert one.ttft == pytest.approx(0.5)  # from when it was due
    assert one.gaps == pytest.approx([0.0, 0.4, 0.2, 0.2, 0.2])
    assert one.mean_gap == pytest.approx(1.0 / 5)


def test_a_request_without_tokens_has_no_first_one():
    none = outcome(code="overloaded")
    assert (none.ttft, none.gaps, none.mean_gap, none.tokens) == (None, [], 0.0, 0)


def test_goodput_counts_whole_requests_within_both_limits():
    requests = [
        outcome((10.1, 1), (10.2, 1)),
        outcome((10.9, 1), (11.0, 1)),  # late to begin
        outcome((10.1, 1), (10.9, 1)),  # slow
        outcome((10.1, 1), (10.2, 1), code="cancelled"),
        outcome(code="overloaded"),
    ]
    summary = summarise(requests, 2.0, Slo(ttft=0.5, itl=0.5))
    assert (summary.good, summary.goodput) == (1, 0.5)
    assert (summary.requests, summary.completed, summary.cancelled, summary.errors) == (5, 3, 1, {"overloaded": 1})
    assert summary.output_tokens == 8
    assert summary.tokens_per_s == 4.0
    assert summary.requests_per_s == 1.5
    assert (summary.cached_tokens, summary.prompt_tokens) == (20, 50)
    assert summary.lateness is not None
    assert summary.lateness.max == pytest.approx(250)
    assert summary.as_json()["slo"] == {"ttft": 0.5, "itl": 0.5}
    assert summarise(requests, 2.0, Slo()).good == 3
    assert summarise(requests, 2.0, Slo()).as_json()["slo"] == {"ttft": None, "itl": None}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100)])
def test_percentiles_of_one_to_a_hundred(share: float, expected: float):
    values: list[float] = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert percentile(values, share) == expected


def test_a_spread_is_in_milliseconds():
    spread = Spread.of([0.001, 0.003])
    assert spread is not None
    assert (spread.mean, spread.p50, spread.max) == pytest.approx((2, 1, 3))
    assert Spread.of([]) is None


def test_a_plot_is_well_formed_and_has_a_line_for_each_series():
    page = ET.fromstring(distributions("a < b & c", {"one": [0.01, 0.1, 1.0], "<two>": [0.0, 0.5], "none": [], "zeros": [0.0]}))
    lines = page.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2
    points = [tuple(map(float, point.split(","))) for point in lines[0].attrib["points"].split()]
    assert points == sorted(points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert ET.fromstring(distributions("nothing", {})) is not None

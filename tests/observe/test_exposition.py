"""The text that a scrape gets, read by Prometheus' own client library."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from streamkv.observe.exposition import Counter, Family, Gauge, Histogram, exposition, quantile


def parsed(*families: Family) -> dict[str, float]:
    text = exposition([(f"x:{family.name}", family, (("engine", "0"),)) for family in families])
    return {
        sample.name + "".join(f"|{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_histogram_is_cumulated_and_ends_with_infinity():
    histogram = Histogram("h", "text", (1.0, 2.5))
    for value, count in ((1.0, 2), (1.1, 3), (2.5, 1), (9.0, 4)):
        histogram.observe(value, count)
    assert parsed(histogram) == {
        "x:h_bucket|engine=0|le=1.0": 2,
        "x:h_bucket|engine=0|le=2.5": 6,
        "x:h_bucket|engine=0|le=+Inf": 10,
        "x:h_sum|engine=0": pytest.approx(2 + 3.3 + 2.5 + 36),
        "x:h_count|engine=0": 10,
    }


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\\"\n'), max_size=20))
def test_any_label_survives(value: str):
    gauge = Gauge("g", "text", ("name",))
    gauge.set(3, value)
    text = exposition([("g", gauge, ())])
    (family,) = text_string_to_metric_families(text)
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"name": value}, 3)]


def test_counts_are_there_before_anything_was_counted():
    plain, known = Counter("c_total", "text"), Counter("d_total", "text", ("why",), [("a",), ("b",)])
    assert parsed(plain, known) == {"x:c_total|engine=0": 0, "x:d_total|engine=0|why=a": 0, "x:d_total|engine=0|why=b": 0}
    plain.add()
    known.add(2, "b")
    known.add(1, "new")
    values = parsed(plain, known)
    assert (values["x:c_total|engine=0"], values["x:d_total|engine=0|why=b"], values["x:d_total|engine=0|why=new"]) == (1, 2, 1)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(values: list[float], q: float):
    histogram = Histogram("h", "text", [float(bound) for bound in range(1, 11)])
    for value in values:
        histogram.observe(value)
    exact = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    found = quantile(histogram.bounds, histogram.counts, q)
    assert found is not None
    assert max(math.ceil(exact), 1) - 1 <= found <= max(math.ceil(exact), 1)


def test_quantiles_of_nothing_and_of_what_is_beyond_the_last_bucket():
    assert quantile((1.0, 2.0), [0, 0, 0], 0.5) is None
    assert quantile((1.0, 2.0), [0, 0, 5], 0.5) == 2.0

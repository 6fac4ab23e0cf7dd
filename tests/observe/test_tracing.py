"""Spans and metrics of streams, taken by the SDK's in-memory exporters."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamkv.cli.observe_options import observer_to
from streamkv.errors import ConfigError
from streamkv.observe.tracing import Tracing, export_to
from streamkv.sampling_params import Sampling
from streamkv.text.events import Finished, Timings
from streamkv.text.stream import PreparedPrompt
from tests.server.serving import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collected:
    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(tracers, MeterProvider(metric_readers=[self.reader]), "fake")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def metrics(self) -> dict[str, list[tuple[dict[str, object], int]]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics]
        return {
            metric.name: [(dict(point.attributes or {}), point.count) for point in metric.data.data_points] for metric in found
        }


async def test_a_stream_is_a_span_below_the_clients():
    collected = Collected()
    async with serving() as served:
        served.streams.observer = collected.tracing
        async with served.raw(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) as raw:
            await raw.create("a", "abc", max_tokens=5)
            await raw.ended("a")
    (span,) = collected.spans
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    said = dict(span.attributes or {})
    assert said["gen_ai.operation.name"] == "text_completion"
    assert (said["gen_ai.provider.name"], said["gen_ai.request.model"]) == ("streamkv", "fake")
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"], said["streamkv.prefill_chunks"]) == (3, 5, 1)
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert span.status.is_unset
    assert span.end_time is not None
    assert span.start_time is not None
    assert span.end_time > span.start_time
    metrics = collected.metrics()
    assert {name: [count for _, count in points] for name, points in metrics.items()} == {
        "gen_ai.server.request.duration": [1],
        "gen_ai.server.time_to_first_token": [1],
        "gen_ai.server.time_per_output_token": [1],
    }


async def test_without_a_parent_each_stream_is_a_trace_of_its_own_and_samples_are_streams():
    collected = Collected()
    async with serving() as served, served.raw() as raw:
        served.streams.observer = collected.tracing
        await raw.create(["a", "b"], "abc", max_tokens=2, seed=1)
        for name in "ab":
            await raw.ended(name)
        await raw.create("c", "abc", max_tokens=2)
        await raw.ended("c")
    assert len({span.context.trace_id for span in collected.spans}) == 3
    assert all(span.parent is None for span in collected.spans)


def test_what_fails_is_an_error_with_its_code_and_no_words():
    collected = Collected()
    prepared = PreparedPrompt([1, 2], Sampling(max_tokens=3))
    collected.tracing.opened(["a", "b"], prepared, "acme\0chosen", 0.0)
    collected.tracing.refused(["a"])
    error = ("numerical_error", "a sentence")
    collected.tracing.finished(Finished("b", "error", 2, 0, 0, Timings(0, 0, 1, 0), error), 1.0)
    said = {span.attributes["gen_ai.response.id"]: span for span in collected.spans if span.attributes}
    assert {name: span.attributes["error.type"] for name, span in said.items() if span.attributes} == {
        "a": "refused",
        "b": "numerical_error",
    }
    assert not any(span.status.is_ok or span.status.is_unset for span in said.values())
    assert "a sentence" not in said["b"].to_json()
    assert '"streamkv.tenant": "acme"' in said["b"].to_json()
    ((labels, count),) = collected.metrics()["gen_ai.server.request.duration"]
    assert (labels["error.type"], count) == ("numerical_error", 1)


def test_nothing_of_it_is_imported_unless_asked_for():
    program = """
import sys, streamkv.cli.serve, streamkv.server.app
sys.exit(any(name.partition(".")[0] == "opentelemetry" for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_an_absent_collector_does_not_hold_up_the_end():
    async with observer_to(None, "fake") as observer:
        assert observer is None
    async with observer_to("http://127.0.0.1:9", "fake") as tracing:
        assert isinstance(tracing, Tracing)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'streamkv\[otel\]'"):
        export_to("http://127.0.0.1:9", "fake")

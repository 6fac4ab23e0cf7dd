"""Spans and metrics of streams, taken by the SDK's in-memory exporters."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.testing import capture_logs

from streamkv.cli.observe_options import observer_to
from streamkv.errors import ConfigError
from streamkv.observe.context import read_traceparent, trace_id
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


HOPS = st.sampled_from(["00", "01", "cc", "ff", "0", "", "0A"])
IDS = st.sampled_from([TRACE, TRACE.upper(), "0" * 32, TRACE[1:], TRACE + "a", PARENT, "0" * 16, "0af7651916cd43g3"])


@settings(max_examples=500)
@given(parts=st.tuples(HOPS, IDS, IDS, HOPS), rest=st.sampled_from(["", "", "-", "-x", "-what-the-future-will-be", "\n", "-\n"]))
@example(parts=("00", TRACE, PARENT, "01"), rest="")
@example(parts=("cc", TRACE, PARENT, "01"), rest="-more")
def test_a_traceparent_is_read_as_the_sdk_reads_it(parts: tuple[str, str, str, str], rest: str):
    given_ = "-".join(parts) + rest
    read = read_traceparent(given_)
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": given_})).get_span_context()
    if read is None:
        assert not theirs.is_valid or rest.endswith("\n")
    else:
        assert (f"{theirs.trace_id:032x}", f"{theirs.span_id:016x}") == (trace_id(read), read[36:52])
        assert len(read) == 55


@pytest.mark.parametrize("given_", [None, "", "x" * 10_000_000, "00-" + "-" * 100_000])
def test_what_is_no_traceparent_names_no_span(given_: str | None):
    assert read_traceparent(given_) is None


OTHER, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""What one stream names, on a connection that belongs to `TRACE`."""


@pytest.mark.parametrize("codec", ["json", "msgpack"])
async def test_each_stream_of_a_connection_may_have_a_parent_of_its_own(codec: str):
    collected = Collected()
    own, broken = f"00-{OTHER}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"
    with capture_logs() as logs:
        async with serving() as served:
            served.streams.observer = collected.tracing
            async with served.raw(codec, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) as raw:
                await raw.create(["own", "sibling"], "abc", max_tokens=2, create_traceparent=own)
                await raw.create("plain", "abc", max_tokens=2)
                await raw.create("broken", "abc", max_tokens=2, create_traceparent=broken)
                user = [{"role": "user", "content": "Hi"}]
                await raw.create("chat", user, api="chat", max_tokens=2, create_traceparent=own)
                await raw.send(t="create", id="vector", api="embeddings", body={"input": "abc"}, traceparent=own)
                await raw.create("refused", "x" * 1000, max_tokens=2, create_traceparent=own)
                for name in ("own", "sibling", "plain", "broken", "chat", "vector", "refused"):
                    ended = await raw.ended(name)
                    assert (ended.code is not None) == (name == "refused"), "a broken one makes no stream fail"
                await raw.send(t="fork", id="fork", **{"from": "plain"}, at=1, traceparent=own)
                await raw.wait_for_type("done", "fork")
    rids = {line["rid"]: line["trace_id"] for line in logs if line["event"] == "stream_finished"}
    found: dict[str, list[str]] = {TRACE: [], OTHER: []}
    for span in collected.spans:
        trace = f"{span.context.trace_id:032x}"
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == {TRACE: PARENT, OTHER: SPAN}[trace]
        said = dict(span.attributes or {})
        found[trace].append(str(said["gen_ai.operation.name"]))
        assert rids[str(said["gen_ai.response.id"])] == trace
    assert sorted(found[TRACE]) == ["text_completion"] * 2
    assert sorted(found[OTHER]) == ["chat", "embeddings", "text_completion", "text_completion", "text_completion"]
    (refused,) = (line for line in logs if line["event"] == "stream_refused")
    assert refused["trace_id"] == OTHER
    assert {line["trace_id"] for line in logs if line["event"] == "stream_opened"} == {TRACE, OTHER}


async def test_without_a_parent_the_log_names_no_trace():
    with capture_logs() as logs:
        async with serving() as served, served.raw() as raw:
            await raw.create("a", "abc", max_tokens=2, create_traceparent="none")
            await raw.ended("a")
    assert {"stream_opened", "stream_finished"} <= {line["event"] for line in logs}
    assert not any("trace_id" in line for line in logs)


async def test_at_the_http_door_each_answer_belongs_to_the_trace_of_its_own_request():
    collected = Collected()
    many = ["abc"] * 20  # more than are in the engine at once: the last ones begin in the engine's task, not in the request's
    trace = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    other = {"traceparent": f"00-{OTHER}-{SPAN}-01"}
    chat: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    requests: list[tuple[str, dict[str, object], dict[str, str], int]] = [
        ("/v1/completions", {"prompt": many, "max_tokens": 2}, trace, 200),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 2, "n": 2, "stream": True}, other, 200),
        ("/v1/chat/completions", chat | {"stream": True}, trace, 200),
        ("/v1/chat/completions", chat, {}, 200),
        ("/v1/embeddings", {"input": "abc"}, other, 200),
        ("/v1/completions", {"prompt": "x" * 1000}, other, 400),
        ("/nothing", {}, trace, 404),
    ]
    with capture_logs() as logs:
        async with serving() as served:
            served.streams.observer = collected.tracing
            for path, body, headers, status in requests:
                async with served.http.post(f"{served.base}{path}", json={"model": "fake"} | body, headers=headers) as answer:
                    assert answer.status == status, await answer.text()
                    await answer.read()
    found: dict[str, list[str]] = {TRACE: [], OTHER: [], "": []}
    traces = {}  # of each span, by the id of its sample
    for span in collected.spans:
        trace_ = f"{span.context.trace_id:032x}" if span.parent is not None else ""
        assert span.parent is None or f"{span.parent.span_id:016x}" == {TRACE: PARENT, OTHER: SPAN}[trace_]
        said = dict(span.attributes or {})
        traces[str(said["gen_ai.response.id"])] = trace_
        found[trace_].append(str(said["gen_ai.operation.name"]))
    assert sorted(found[TRACE]) == ["chat"] + ["text_completion"] * 20
    assert sorted(found[OTHER]) == ["embeddings", "text_completion", "text_completion"]
    assert found[""] == ["chat"]
    of_event: dict[str, list[str]] = {}
    for line in logs:
        if line["event"].startswith("request_"):
            of_event.setdefault(line["event"], []).append(line.get("trace_id", ""))
    assert sorted(of_event["request_opened"]) == sorted([TRACE, OTHER, TRACE, ""])
    assert sorted(of_event["request_finished"]) == sorted([TRACE] * 21 + [OTHER] * 2 + [""])
    assert of_event["request_failed"] == [OTHER, TRACE]


async def test_a_request_too_broken_to_be_routed_is_not_logged_as_part_of_the_trace_before_it():
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n"
    with capture_logs() as logs:
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            answered = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", answered)[1]))  # type: ignore[index]  # it is there
            writer.write(b"this is not HTTP\r\n\r\n")
            await reader.read()
            writer.close()
            await writer.wait_closed()
    assert [line.get("trace_id") for line in logs if line["event"] == "request_failed"] == [TRACE, None]


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

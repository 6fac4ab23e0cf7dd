"""OpenTelemetry, if it is asked for: one span a stream, and the GenAI server metrics. Needs `pip install streamkv[otel]`.

Names are those of the GenAI semantic conventions, which are still in development. Spans carry counts and times, never a word
of prompt or answer. Exporting happens in the SDK's own threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from streamkv.engine.api import StepBatch
from streamkv.errors import ConfigError
from streamkv.observe.context import OPERATION, TRACEPARENT
from streamkv.text.events import Finished
from streamkv.text.stream import PreparedPrompt

__all__ = ["Tracing", "export_to"]

_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Tracing:
    """An observer that makes spans. Costs nothing per token."""

    def __init__(self, tracers: Any, meters: Any, model: str) -> None:
        """`tracers` and `meters` are the SDK's providers."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracers.get_tracer("streamkv")
        self._providers = (tracers, meters)
        self._model = model
        self._spans: dict[str, tuple[Any, dict[str, Any]]] = {}
        meter = meters.get_meter("streamkv")

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit="s", description=text, explicit_bucket_boundaries_advisory=list(bounds))

        self._duration = histogram("gen_ai.server.request.duration", "From submission to the last token.", _SECONDS)
        self._ttft = histogram("gen_ai.server.time_to_first_token", "From submission to the first token.", _FIRST)
        self._tpot = histogram("gen_ai.server.time_per_output_token", "Mean time per token after the first.", _PER_TOKEN)

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """Start a span for each, below the span that the client named in `traceparent`."""
        header = TRACEPARENT.get()
        parent = self._propagator.extract({"traceparent": header}) if header else None
        operation = "embeddings" if prepared.pooling is not None else OPERATION.get()
        common = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "streamkv",
            "gen_ai.request.model": self._model,
        }
        for request_id in ids:
            wanted = {
                "gen_ai.request.max_tokens": prepared.sampling.max_tokens,
                "gen_ai.response.id": request_id,
                "streamkv.tenant": salt.partition("\0")[0],
            }
            # Without a parent of its own it begins a trace: what else this task has done is no part of it.
            span = self._tracer.start_span(
                f"{operation} {self._model}",
                context=parent,
                kind=self._kind,
                attributes=common | wanted,
                start_time=time.time_ns(),
            )
            self._spans[request_id] = span, common

    def refused(self, ids: Sequence[str]) -> None:
        """They end as errors."""
        for request_id in ids:
            span, _ = self._spans.pop(request_id, (None, {}))
            if span is not None:
                self._fail(span, "refused")
                span.end()

    def batch(self, batch: StepBatch) -> None:
        """Nothing: what a span says is known at its end."""

    def finished(self, event: Finished, now: float) -> Finished:
        """End the span and book the metrics."""
        span, common = self._spans.pop(event.id, (None, {}))
        if span is None:
            return event
        timings, why = event.timings, event.why
        span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [event.finish_reason],
                "gen_ai.usage.input_tokens": event.prompt_tokens,
                "gen_ai.usage.output_tokens": event.completion_tokens,
                "streamkv.cached_tokens": event.cached_tokens,
                "streamkv.queue_seconds": timings.queue,
                "streamkv.prefill_seconds": timings.prefill,
                "streamkv.decode_seconds": timings.decode,
                "streamkv.prefill_chunks": why.chunks,
                "streamkv.preemptions": why.preemptions,
                "streamkv.preempted_seconds": why.preempted,
                "streamkv.stalled_seconds": why.stalled,
                "streamkv.loop_lag_seconds": why.lag,
                "streamkv.cache_miss": why.miss or "none",
            }
        )
        labels = common
        if event.error is not None:
            self._fail(span, event.error[0])
            labels = common | {"error.type": event.error[0]}
        span.end(time.time_ns())
        self._duration.record(timings.ttft + timings.decode, labels)
        if event.completion_tokens:
            self._ttft.record(timings.ttft, labels)
        if event.completion_tokens > 1:
            self._tpot.record(timings.decode / (event.completion_tokens - 1), labels)
        return event

    def _fail(self, span: Any, code: str) -> None:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR)

    def close(self) -> None:
        """Send what is left; blocks for as long as that takes, a few seconds at most."""
        for provider in self._providers:
            provider.shutdown()


def export_to(endpoint: str, model: str) -> Tracing:
    """Spans and metrics to a collector, by OTLP over HTTP.

    Args:
        endpoint: the collector's base URL, for example http://127.0.0.1:4318.
        model: as clients name it.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("--otel-endpoint needs OpenTelemetry: pip install 'streamkv[otel]'", param="otel_endpoint") from error
    base = endpoint.rstrip("/")
    resource = Resource.create({"service.name": "streamkv"})
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=3)))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=3))
    meters = MeterProvider(metric_readers=[reader], resource=resource, shutdown_on_exit=False)
    return Tracing(tracers, meters, model)

"""Options of `streamkv serve` about what an operator sees."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from streamkv.text.observer import Observer

__all__ = ["add_observe_arguments", "observer_to"]

_CLOSE_S: Final = 5.0


def add_observe_arguments(parser: argparse.ArgumentParser) -> None:
    """Metrics and traces."""
    group = parser.add_argument_group("observability", "See docs/observability.md.")
    group.add_argument(
        "--metrics-prefix",
        choices=["vllm", "streamkv", "both"],
        default="vllm",
        help="of the metrics that vLLM has too, whose dashboards then load unchanged (%(default)s)",
    )
    group.add_argument("--metrics-public", action="store_true", help="GET /metrics asks for no admin key")
    group.add_argument("--otel-endpoint", metavar="URL", help="OpenTelemetry collector, OTLP over HTTP (needs streamkv[otel])")


@asynccontextmanager
async def observer_to(endpoint: str | None, model: str) -> AsyncIterator[Observer | None]:
    """An observer that exports to a collector; None without an address, and then nothing of OpenTelemetry is imported."""
    if endpoint is None:
        yield None
        return
    from streamkv.observe.tracing import export_to

    tracing = export_to(endpoint, model)
    try:
        yield tracing
    finally:
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.to_thread(tracing.close)
        except TimeoutError:
            return  # a collector that does not answer does not hold up the end

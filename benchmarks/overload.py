"""Three times the load that the server can carry: does it still do as much useful work, and does it refuse at once?

python -m benchmarks.overload [--seconds 60] [--times 3] [--slo 1.0] [--door sse] [--seed 1] [--quick]

The real scheduler over a runner that only takes time: 16 requests at once, 10 ms a step and 20 µs a token. Prompts of 64 tokens,
answers of 32. First a closed loop finds the peak; then requests come three times as fast, independently of each other. A
request is good if it ends and its first token came within 1.2 x the SLO that the server was told. The load comes from
another process (`streamkv.bench`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.server import child
from benchmarks.timed import Cost, served, timed_engine
from streamkv.bench.load import Plan, drive
from streamkv.bench.profiles import fixed
from streamkv.bench.results import Outcome, Slo, summarise
from streamkv.bench.senders import DOORS, Target, open_sender
from streamkv.logs import configure_logs
from streamkv.server.config import ServerConfig

PROMPT, ANSWER, AT_ONCE = 64, 32, 16
REFUSALS = ("overloaded", "rate_limited", "rate_limit_exceeded", "too_many_streams")


@dataclass(frozen=True)
class Load:
    """What the other process sends; `rate` None = closed loop."""

    door: str
    requests: int
    rate: float | None
    slo: float
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description="measure goodput under overload")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=3.0, help="of the peak (%(default)s)")
    parser.add_argument("--slo", type=float, default=1.0, help="seconds to the first token (%(default)s)")
    parser.add_argument("--door", choices=DOORS, default="sse")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 seconds: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 3.0
    print_setting("streamkv", "aiohttp", "uvloop")
    configure_logs(level="error")
    uvloop.run(_measure(arguments))


async def _measure(arguments: argparse.Namespace) -> None:
    slo = Slo(ttft=1.2 * arguments.slo)
    async with timed_engine(Cost(0.010, 20e-6), num_seqs=AT_ONCE) as engine:
        config = ServerConfig(port=0, slo_ttft_s=arguments.slo, drain_timeout_s=0.0)
        async with served(engine, config) as server:
            share = min(1.0, arguments.seconds / 60)
            closed = await _send(server.port, Load(arguments.door, int(600 * share), None, arguments.slo, arguments.seed))
            peak = summarise(*closed, slo).goodput
            rate = arguments.times * peak
            count = int(rate * arguments.seconds)
            outcomes, seconds = await _send(server.port, Load(arguments.door, count, rate, arguments.slo, arguments.seed + 1))
            after = await _send(server.port, Load(arguments.door, 30, peak / 2, arguments.slo, arguments.seed + 2))
    _report(arguments, peak, outcomes, seconds, slo)
    back = summarise(*after, slo)
    print(f"right after it, at half of the peak: {back.good} of {back.requests} requests good")


def _report(arguments: argparse.Namespace, peak: float, outcomes: list[Outcome], seconds: float, slo: Slo) -> None:
    summary = summarise(outcomes, seconds, slo)
    refused = [(outcome.ended - outcome.sent) * 1000 for outcome in outcomes if outcome.code in REFUSALS]
    admitted = [outcome.ttft * 1000 for outcome in outcomes if outcome.code == "ok" and outcome.ttft is not None]
    other = {code: count for code, count in summary.errors.items() if code not in REFUSALS}
    header = [
        "",
        "requests/s",
        "goodput /s",
        "of the peak",
        "admitted p99 TTFT ms",
        "refused",
        "refusal p50 ms",
        "p99 ms",
        "max ms",
        "other ends",
    ]
    row: list[object] = [
        f"{arguments.times:g} x, {arguments.seconds:g} s, {arguments.door}",
        f"{len(outcomes) / seconds:.1f}",
        f"{summary.goodput:.1f}",
    ]
    row += [f"{summary.goodput / peak * 100:.0f} %", f"{percentile(admitted, 0.99):.0f}", f"{len(refused):,}"]
    row += [f"{percentile(refused, share):.1f}" for share in (0.5, 0.99, 1.0)] if refused else ["-"] * 3
    first = ["peak, closed loop", "-", f"{peak:.1f}", "100 %", *["-"] * 6]
    print_table(
        f"Overload; server's SLO {arguments.slo:g} s, good within {slo.ttft:g} s",
        header,
        [first, [*row, json.dumps(other) if other else "0"]],
    )


async def _send(port: int, load: Load) -> tuple[list[Outcome], float]:
    with child(_client, port, load) as (_, client):
        found: tuple[list[Outcome], float] = await asyncio.to_thread(client.recv)
        return found


def _client(parent: Connection, port: int, load: Load) -> None:
    parent.send(uvloop.run(_drive(port, load)))


async def _drive(port: int, load: Load) -> tuple[list[Outcome], float]:
    requests = fixed(PROMPT, ANSWER, load.rate or 1.0).generate(load.requests, load.seed)
    settings: dict[str, Any] = {"concurrency": AT_ONCE} if load.rate is None else {}
    async with open_sender(Target.at(f"http://127.0.0.1:{port}", door=load.door)) as sender:
        summary, outcomes = await drive(Plan(requests, load.seed, **settings), sender)
    return outcomes, summary.seconds


if __name__ == "__main__":
    main()

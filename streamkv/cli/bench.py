"""`streamkv bench serve [URL]`: put load on a running server and print what its clients feel."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from streamkv.bench.load import Plan, drive
from streamkv.bench.plot import distributions
from streamkv.bench.profiles import PROFILES, fixed
from streamkv.bench.results import Outcome, Slo, Spread, Summary
from streamkv.bench.senders import DOORS, Target, open_sender
from streamkv.bench.trace import BLOCK, TraceRequest, ideal_hit_ratio, read_trace, write_trace

__all__ = ["add_arguments", "run"]

_CONCURRENCY = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="serve")
    serve = kinds.add_parser("serve", help="load on a running server", description=__doc__)
    serve.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="(%(default)s)")
    serve.add_argument("--door", choices=DOORS, default="native", help="WebSocket, or /v1/completions (%(default)s)")
    serve.add_argument("--streams-per-socket", type=_positive, metavar="K", help="native only (default: what the server runs)")
    _add_traffic(serve)
    serve.add_argument("--cancel", type=_share, default=0.0, metavar="SHARE", help="of requests that are given up half-way")
    serve.add_argument("--slo-ttft", type=_above_0, default=math.inf, metavar="SECONDS", help="to the first token, for goodput")
    serve.add_argument("--slo-itl", type=_above_0, default=math.inf, metavar="SECONDS", help="mean between tokens, for goodput")
    serve.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    serve.add_argument("--plot", type=Path, metavar="FILE", help="write the distributions as SVG")


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("traffic")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--profile", choices=["fixed", *PROFILES], default="fixed", help="see docs/bench.md (%(default)s)")
    kind.add_argument("--trace", type=Path, metavar="FILE", help="requests in Mooncake's JSONL format")
    group.add_argument("--requests", type=_positive, metavar="N", help="how many (100, or all of the trace)")
    pace = group.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=_positive, metavar="N", help=f"at once, closed loop ({_CONCURRENCY} if fixed)")
    pace.add_argument("--rate", type=_above_0, metavar="R", help="mean arrivals per second, open loop (as in the trace)")
    group.add_argument(
        "--scale", type=_power_of_2, default=1, metavar="S", help="divide lengths by a power of 2, for small models"
    )
    group.add_argument("--prompt-tokens", type=_positive, default=128, metavar="P", help="of profile fixed (%(default)s)")
    group.add_argument("--output-tokens", type=_positive, default=128, metavar="O", help="of profile fixed (%(default)s)")
    group.add_argument("--seed", type=int, help="the same again meets the prefix cache (default: a new one)")
    group.add_argument("--write-trace", type=Path, metavar="FILE", help="write the requests before sending them")


def run(arguments: argparse.Namespace) -> int:
    """Measure; 0 if every stream came to its end."""
    traffic = _traffic(arguments)
    if arguments.write_trace is not None:
        write_trace(arguments.write_trace, traffic.plan.requests)
    target = Target.at(
        arguments.url,
        door=arguments.door,
        per_socket=arguments.streams_per_socket,
        api_key=os.environ.get("STREAMKV_API_KEY") or None,
    )
    summary, outcomes = asyncio.run(_bench(target, traffic))
    _print(summary)
    if arguments.json is not None:
        setting = {"url": target.base, "door": target.door, "traffic": traffic.name, "seed": traffic.plan.seed}
        arguments.json.write_text(json.dumps(setting | summary.as_json(), indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        arguments.plot.write_text(_plot(f"{traffic.name}, {target.door}", outcomes), encoding="utf-8")
    return 1 if summary.errors else 0


@dataclass(frozen=True)
class _Traffic:
    name: str
    plan: Plan


def _traffic(arguments: argparse.Namespace) -> _Traffic:
    seed = arguments.seed if arguments.seed is not None else secrets.randbits(32)
    count = arguments.requests or 100
    concurrency = arguments.concurrency
    if arguments.trace is not None:
        name, requests = arguments.trace.name, read_trace(arguments.trace)[: arguments.requests]
    elif arguments.profile != "fixed":
        name, requests = arguments.profile, PROFILES[arguments.profile].generate(count, seed)
    else:
        name = f"{arguments.prompt_tokens} prompt and {arguments.output_tokens} output tokens"
        requests = fixed(arguments.prompt_tokens, arguments.output_tokens, arguments.rate or 1.0).generate(count, seed)
        concurrency = concurrency or (_CONCURRENCY if arguments.rate is None else None)
    plan = Plan(
        requests,
        seed,
        concurrency,
        speed=_speed(requests, arguments.rate),
        scale=arguments.scale,
        cancel_share=arguments.cancel,
        slo=Slo(arguments.slo_ttft, arguments.slo_itl),
    )
    return _Traffic(name, plan)


def _speed(requests: list[TraceRequest], rate: float | None) -> float:
    """How much faster than in the trace requests must come to reach a mean rate."""
    seconds = (requests[-1].timestamp - requests[0].timestamp) / 1000
    return rate * seconds / (len(requests) - 1) if rate is not None and seconds > 0 else 1.0


async def _bench(target: Target, traffic: _Traffic) -> tuple[Summary, list[Outcome]]:
    plan = traffic.plan
    pace = f"{plan.concurrency} at once" if plan.concurrency else f"open loop, {plan.speed:.3g} x the trace's pace"
    async with open_sender(target) as sender:
        shared = f", {ideal_hit_ratio(plan.requests):.1%} of blocks seen before" if len(plan.requests) > 1 else ""
        print(
            f"{sender.model} at {target.base} ({target.door}): {len(plan.requests)} requests, {traffic.name}{shared}, "
            f"lengths / {plan.scale}, {pace}, seed {plan.seed}",
            flush=True,
        )
        return await drive(plan, sender)


def _plot(title: str, outcomes: list[Outcome]) -> str:
    whole = [outcome for outcome in outcomes if outcome.code == "ok"]
    series = {
        "time to first token": [outcome.ttft or 0.0 for outcome in whole],
        "between tokens": [gap for outcome in whole for gap in outcome.gaps],
        "whole stream": [outcome.ended - outcome.due for outcome in whole],
    }
    return distributions(title, series)


def _print(summary: Summary) -> None:
    print(f"{'milliseconds':<24}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    rows = (("time to first token", summary.ttft), ("between tokens", summary.itl), ("whole stream", summary.e2e))
    for name, spread in (*rows, ("sent too late by", summary.lateness)):
        print(f"{name:<24}{_cells(spread)}")
    print(
        f"{summary.output_tokens:,} output tokens in {summary.seconds:.2f} s: {summary.tokens_per_s:,.1f} tok/s, "
        f"{summary.requests_per_s:.2f} requests/s"
    )
    if not math.isinf(summary.slo.ttft) or not math.isinf(summary.slo.itl):
        print(f"goodput: {summary.goodput:.2f} requests/s, {summary.good} of {summary.requests} within the SLO")
    share = summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
    print(f"{summary.cached_tokens:,} of {summary.prompt_tokens:,} prompt tokens from the prefix cache ({share:.1%})")
    print(f"completed: {summary.completed}, cancelled: {summary.cancelled}, errors: {sum(summary.errors.values())}")
    for code, count in summary.errors.items():
        print(f"  {count} x {code}: {summary.messages.get(code, '')}".rstrip(": "))


def _cells(spread: Spread | None) -> str:
    values = (None,) * 4 if spread is None else (spread.mean, spread.p50, spread.p90, spread.p99)
    return "".join(f"{'-':>10}" if value is None else f"{value:>10.1f}" for value in values)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return value


def _power_of_2(text: str) -> int:
    value = _positive(text)
    if value & (value - 1) or value > BLOCK // 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no power of 2 up to {BLOCK // 4}")
    return value


def _above_0(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

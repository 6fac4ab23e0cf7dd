"""`streamkv bench`: put load on a running server and print what its clients feel.

Every stream completes a prompt of random token ids, greedily and past the end-of-sequence token, so that lengths are exact.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from streamkv.client import Client, ClientConnectionError, RemoteError, connect

__all__ = ["add_arguments", "run"]

_TOKEN_IDS: Final = range(32, 256)
"""In every model's vocabulary, and clear of the special tokens that stand first."""


@dataclass(slots=True)
class _Load:
    """What was measured: seconds and tokens of all streams together.

    Attributes:
        first: from sending the request to the first token.
        gaps: from token to token; those that came in one delta share its gap.
        total: from sending the request to the last frame.
    """

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--url", default="ws://127.0.0.1:8000/v1/stream", help="(%(default)s)")
    parser.add_argument("--streams", type=_positive, default=32, metavar="N", help="how many in all (%(default)s)")
    parser.add_argument(
        "--rate", type=_rate, default=math.inf, metavar="R", help="arrivals per second, Poisson (default: all at once)"
    )
    parser.add_argument("--prompt-tokens", type=_positive, default=128, metavar="P", help="of each stream (%(default)s)")
    parser.add_argument("--output-tokens", type=_positive, default=128, metavar="O", help="of each stream (%(default)s)")
    parser.add_argument(
        "--seed", type=int, help="of prompts and arrivals; the same again meets the prefix cache (default: a new one)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure; 0 if every stream came to its end."""
    return asyncio.run(_bench(arguments))


async def _bench(arguments: argparse.Namespace) -> int:
    seed = arguments.seed if arguments.seed is not None else secrets.randbits(32)
    source = random.Random(seed)  # noqa: S311  # load, not secrets
    prompts = [source.choices(_TOKEN_IDS, k=arguments.prompt_tokens) for _ in range(arguments.streams)]
    starts = _arrivals(source, arguments.streams, arguments.rate)
    load = _Load()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(connect(arguments.url))
        welcome = first.welcome
        assert welcome is not None
        # As many connections as it takes for no stream to wait in its connection's queue.
        others = range(-(-arguments.streams // welcome.limits.streams) - 1)
        clients = [first, *[await stack.enter_async_context(connect(arguments.url)) for _ in others]]
        when = "all at once" if math.isinf(arguments.rate) else f"{arguments.rate:g} a second"
        print(
            f"{welcome.models[0]} at {arguments.url}: {arguments.streams} streams on {len(clients)} connections, {when}, "
            f"{arguments.prompt_tokens} prompt and {arguments.output_tokens} output tokens each, seed {seed}",
            flush=True,
        )
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
                client = clients[index % len(clients)]
                group.create_task(_stream(client, prompt, began + start, arguments.output_tokens, load))
        seconds = time.perf_counter() - began
    _print(load, seconds)
    return 1 if load.errors else 0


def _arrivals(source: random.Random, count: int, rate: float) -> list[float]:
    """Seconds after the start at which each stream is sent; the first at once."""
    if math.isinf(rate):
        return [0.0] * count
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + source.expovariate(rate))
    return times


async def _stream(client: Client, prompt: list[int], due: float, max_tokens: int, load: _Load) -> None:
    """Send one stream when it is due and follow it to its end."""
    await asyncio.sleep(due - time.perf_counter())
    sent = last = time.perf_counter()
    stream = client.complete(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    try:
        async for delta in stream:
            now = time.perf_counter()
            if delta.o == 0:
                load.first.append(now - sent)
                load.gaps += [0.0] * (delta.n - 1)
            else:
                load.gaps += [(now - last) / max(1, delta.n)] * delta.n
            load.tokens += delta.n
            last = now
    except RemoteError as error:
        load.errors[f"{error.remote_code}: {error.message}"] += 1
        return
    except ClientConnectionError as error:
        load.errors[error.message] += 1
        return
    load.total.append(time.perf_counter() - sent)
    assert stream.done is not None
    if stream.done.finish_reason != "length":
        load.errors[f"ended with {stream.done.finish_reason} before its length"] += 1
    load.prompt_tokens += stream.done.usage.prompt
    load.cached_tokens += stream.done.usage.cached


def _print(load: _Load, seconds: float) -> None:
    print(f"{'milliseconds':<24}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name, values in (("time to first token", load.first), ("between tokens", load.gaps), ("whole stream", load.total)):
        cells = "".join(f"{_percentile(values, share) * 1000:>10.1f}" if values else f"{'-':>10}" for share in (0.5, 0.9, 0.99))
        print(f"{name:<24}{cells}")
    print(f"{load.tokens:,} output tokens in {seconds:.2f} s: {load.tokens / seconds:,.1f} tok/s")
    print(f"{load.cached_tokens:,} of {load.prompt_tokens:,} prompt tokens from the prefix cache")
    print(f"errors: {sum(load.errors.values())}")
    for message, count in load.errors.most_common():
        print(f"  {count} x {message}")


def _percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value

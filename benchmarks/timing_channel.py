"""R-TIMING: does the time to the first token tell what another tenant has asked?

python -m benchmarks.timing_channel [--rounds 500] [--prompt 256] [--seed 0] [--quick]

`streamkv serve` with the model in the box in a process of its own, two tenants' keys, one connection. Every round makes three
pairs of requests, in an order drawn anew, each with a prompt of its own. The second of a pair is timed, from sending it to its
first token:

    cold       the other tenant has just sent another prompt of this length
    theirs     the other tenant has just sent this very prompt
    own        the tenant itself has: the control, which must be seen

Whether two samples come from one distribution is asked of Kolmogorov and Smirnov. Fails if the control is not seen, or if
"theirs" differs from "cold" with p below 0.001.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import aiohttp

from benchmarks.report import percentile, print_setting, print_table

KEYS: Final = {"tenant": "key-of-the-tenant-0123456789", "other": "key-of-the-other-0123456789"}
VOCAB: Final = range(100, 3000)  # ordinary tokens of the model in the box
KINDS: Final = ("cold", "theirs", "own")
SURE: Final = 1e-3
"""A smaller p is no accident."""


def main() -> int:
    parser = argparse.ArgumentParser(description="does the time to the first token tell what another tenant has asked?")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and order")
    parser.add_argument("--quick", action="store_true", help="40 rounds: shows that it runs")
    arguments = parser.parse_args()
    rounds = 40 if arguments.quick else arguments.rounds
    print_setting("streamkv", "torch", "aiohttp")
    with serving() as url:
        seconds = asyncio.run(measure(url, rounds, arguments.prompt, random.Random(arguments.seed)))
    found = {kind: kolmogorov_smirnov(seconds["cold"], seconds[kind]) for kind in ("theirs", "own")}
    rows = []
    for kind, times in seconds.items():
        d, p = found.get(kind, ("-", "-"))
        spread = [f"{value * 1000:.2f}" for value in (median(times), percentile(times, 0.9))]
        rows.append([kind, len(times), *spread, *(f"{x:.3g}" if isinstance(x, float) else x for x in (d, p))])
    header = ["the prompt was sent before by", "n", "median ms", "p90 ms", "D against cold", "p"]
    print_table(f"Time to the first token, prompts of {arguments.prompt} tokens", header, rows)
    return int(found["own"][1] > SURE or found["theirs"][1] < SURE)


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(largest distance of the two empirical distributions, how probable one so large is if there is no difference).

    The asymptotic series with Stephens' correction for small samples (Numerical Recipes, 14.3).
    """
    first, second = sorted(one), sorted(other)
    d = max(
        abs(bisect_right(first, value) / len(first) - bisect_right(second, value) / len(second)) for value in (*first, *second)
    )
    root = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * d
    if scaled < 0.2:
        return d, 1.0  # the series does not converge; the sum is 1 to twelve places
    terms = ((-1) ** (k - 1) * math.exp(-2.0 * (k * scaled) ** 2) for k in range(1, 101))
    return d, min(1.0, max(0.0, 2.0 * math.fsum(terms)))


@contextmanager
def serving() -> Iterator[str]:
    """A server process; its address."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text(
            "\n".join(f'[[keys]]\ntenant = "{name}"\nsha256 = "{sha256(key.encode()).hexdigest()}"' for name, key in KEYS.items())
        )
        command = [sys.executable, "-m", "streamkv", "serve", "--port", "0", "--num-blocks", "4096", "--api-keys", str(keys)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            try:
                found = (re.search(r"ws://([\d.]+:\d+)/", line) for line in process.stdout if line.startswith("ready."))
                address = next(match[1] for match in found if match is not None)
                yield f"http://{address}/v1/completions"
            finally:
                process.send_signal(signal.SIGTERM)
                process.communicate()


async def measure(url: str, rounds: int, length: int, source: random.Random) -> dict[str, list[float]]:
    """Seconds to the first token, by kind."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with aiohttp.ClientSession() as http:
        for turn in range(-3, rounds):
            for kind in source.sample(KINDS, len(KINDS)):
                prompt, unlike = (source.choices(VOCAB, k=length) for _ in range(2))
                await first_token(http, url, "tenant" if kind == "own" else "other", unlike if kind == "cold" else prompt)
                spent = await first_token(http, url, "tenant", prompt)
                if turn >= 0:  # the first ones warm up
                    seconds[kind].append(spent)
    return seconds


async def first_token(http: aiohttp.ClientSession, url: str, tenant: str, prompt: list[int]) -> float:
    """Send a prompt, wait for its first token."""
    body = {"model": "streamkv-demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True, "ignore_eos": True}
    began = perf_counter()
    async with http.post(url, json=body, headers={"Authorization": f"Bearer {KEYS[tenant]}"}) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data:"):
                spent = perf_counter() - began
                await answer.read()
                return spent
    raise RuntimeError("an answer without a token")


if __name__ == "__main__":
    sys.exit(main())

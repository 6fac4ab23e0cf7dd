"""How long the event loop waits for the interpreter while the runner computes, by switch interval.

python -m benchmarks.loop_lag [--seconds 5] [--quick]

32 streams of the model in the box keep the runner's thread busy; a timer on the loop fires every 2 ms and notes how late it is.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from time import perf_counter

from benchmarks.report import percentile, print_setting, print_table
from streamkv.async_engine import Engine
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.sampling_params import SamplingParams

INTERVALS_MS = (5.0, 1.0, 0.2)
TICK_S = 0.002
STREAMS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="lag of the event loop by thread switch interval")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each interval and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a second in all")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.rounds = 0.3, 1
    configure_logs(level="warning")
    print_setting("streamkv", "torch")
    asyncio.run(_run(arguments.seconds, arguments.rounds))


async def _run(seconds: float, rounds: int) -> None:
    lags: dict[float, list[float]] = {interval: [] for interval in INTERVALS_MS}
    tokens: dict[float, list[float]] = {interval: [] for interval in INTERVALS_MS}
    async with Engine(EngineConfig()) as engine:
        await _measure(engine, 0.3)
        for _ in range(rounds):
            for interval in INTERVALS_MS:  # interleaved: what else the machine does hits all alike
                sys.setswitchinterval(interval / 1000)
                late, speed = await _measure(engine, seconds)
                lags[interval] += late
                tokens[interval].append(speed)
    rows = [
        [
            f"{interval} ms",
            *(f"{percentile(lags[interval], share) * 1000:.2f}" for share in (0.5, 0.99, 1.0)),
            f"{sorted(tokens[interval])[len(tokens[interval]) // 2]:.0f}",
        ]
        for interval in INTERVALS_MS
    ]
    header = ["switch interval", "lag p50 ms", "p99 ms", "max ms", "tok/s, median"]
    print_table(f"event loop lag, {STREAMS} streams of the model in the box", header, rows)


async def _measure(engine: Engine, seconds: float) -> tuple[list[float], float]:
    """(how late each tick was, tokens per second)."""
    count = 0

    async def stream(number: int) -> None:
        nonlocal count
        while True:
            params = SamplingParams(max_tokens=400, temperature=1.0, seed=number, ignore_eos=True)
            async for output in engine.generate([1, 5 + number, 7], params):
                count += len(output.outputs[0].token_ids) > 0

    tasks = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    late: list[float] = []
    began = perf_counter()
    while perf_counter() - began < seconds:
        due = perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late.append(perf_counter() - due)
    elapsed = perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return late, count / elapsed


if __name__ == "__main__":
    main()

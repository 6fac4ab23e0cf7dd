"""One stalled stream among 64 on one socket: does it slow the others down, and does it stop where its credit ends?

python -m benchmarks.fairness [--streams 64] [--rate 20] [--seconds 5] [--rounds 3] [--quick]

Rounds without and with the stalled stream take turns. Latency is that of benchmarks.server: engine's queue to client's socket.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.report import print_setting, print_table
from benchmarks.server import CREDIT, LOOPS, Figures, Setting, latency


def main() -> None:
    parser = argparse.ArgumentParser(description="measure what one stalled stream does to the others of its socket")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", choices=LOOPS, default="uvloop", help="of the server (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="8 streams, 1 second, one round: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.seconds, arguments.rounds = 8, 1.0, 1
    print_setting("streamkv", "aiohttp", "uvloop", "msgspec")
    found: dict[int, list[Figures]] = {0: [], 1: []}
    for _ in range(arguments.rounds):
        for stalled, figures in found.items():
            setting = Setting(
                arguments.streams, arguments.rate, arguments.seconds, 1, "json", arguments.loop, flush_s=0.0, stalled=stalled
            )
            figures.append(latency(setting))
    tokens = [count for figures in found[1] for count in figures.stalled]
    assert tokens == [CREDIT] * arguments.rounds, f"a stream with credit for {CREDIT} tokens has had {tokens}"
    assert not any(figures.stalled for figures in found[0])
    plain = statistics.median(figures.p99 for figures in found[0])
    rows = []
    for name, figures in (("all read", found[0]), (f"one stalled after {CREDIT} tokens", found[1])):
        p99 = statistics.median(item.p99 for item in figures)
        spread = f"{min(item.p99 for item in figures):.2f}-{max(item.p99 for item in figures):.2f}"
        p50 = statistics.median(item.p50 for item in figures)
        stalled = f"{tokens[0]} in each round" if figures is found[1] else "-"
        rows.append([name, f"{p50:.2f}", f"{p99:.2f}", spread, f"{(p99 / plain - 1) * 100:+.1f} %", stalled])
    header = ["", "others' p50 ms", "others' p99 ms", "p99 of the rounds", "p99 against all read", "tokens of the stalled one"]
    print_table(
        f"{arguments.streams} streams on one socket, {arguments.rate:g} tok/s each, {arguments.rounds} rounds", header, rows
    )


if __name__ == "__main__":
    main()

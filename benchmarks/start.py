"""From `streamkv serve` to ready: the model in the box, a new process each time.

python -m benchmarks.start [--rounds 5]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from statistics import median
from time import perf_counter

from benchmarks.report import print_setting, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds from `streamkv serve` to ready")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    print_setting("streamkv", "torch", "transformers")
    _start()  # files into the page cache
    seconds = [_start() for _ in range(1 if arguments.quick else arguments.rounds)]
    row = ["`streamkv serve`, model in the box", f"{median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"]
    print_table("seconds from the command to ready", ["command", "median", "min", "max"], [row])


def _start() -> float:
    began = perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "streamkv", "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout is not None
        ready = any(line.startswith("ready.") for line in process.stdout)
        seconds = perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert ready, "the server did not become ready"
    return seconds


if __name__ == "__main__":
    main()

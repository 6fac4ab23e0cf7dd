"""From `streamkv serve` to ready, beside a bare `import torch, transformers`: a new process each time, files in the page cache.

python -m benchmarks.start [--rounds 5] [--model-dir DIR] [--quick]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model

BARE = "`import torch, transformers`"


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds from `streamkv serve` to ready")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, a tiny model")
    arguments = parser.parse_args()
    print_setting("streamkv", "torch", "transformers")
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    commands = {
        BARE: ["-c", "import torch, transformers; print('ready.', flush=True)"],
        "`streamkv serve`, model in the box": ["-m", "streamkv", "serve", "--port", "0"],
        f"`streamkv serve`, {folder.name}": ["-m", "streamkv", "serve", str(folder), "--port", "0"],
    }
    for command in commands.values():
        _start(command)  # files into the page cache
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for name, command in commands.items():
            seconds[name].append(_start(command))
    rows = [
        [
            name,
            *(f"{value:.2f}" for value in (median(values), min(values), max(values))),
            f"{median(value / bare for value, bare in zip(values, seconds[BARE], strict=True)):.2f}",
        ]
        for name, values in seconds.items()
    ]
    print_table("seconds from the command to ready", ["command", "median", "min", "max", "median ratio to the import"], rows)


def _start(command: list[str]) -> float:
    """Seconds until a new interpreter prints the line that begins with "ready."."""
    began = perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        assert process.stdout is not None
        ready = any(line.startswith("ready.") for line in process.stdout)
        seconds = perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert ready, f"{command} did not become ready"
    return seconds


if __name__ == "__main__":
    main()

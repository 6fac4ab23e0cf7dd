"""What every benchmark prints: its setting, then Markdown tables that can be pasted into docs/benchmarks.md."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["num_cores", "percentile", "print_setting", "print_table"]


def print_setting(*packages: str) -> None:
    """Print command, machine and versions, and what else the machine was doing."""
    name = _command_name()
    print(f"command: `python -m {name} {shlex.join(sys.argv[1:])}".rstrip() + "`  ")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"machine: {_processor()}, {num_cores()} cores usable, load average {load} at the start  ")
    versions = [f"Python {platform.python_version()}", *(f"{package} {_version(package)}" for package in packages)]
    print(f"versions: {', '.join(versions)}\n", flush=True)


def _command_name() -> str:
    main = sys.modules["__main__"]
    return main.__spec__.name if main.__spec__ is not None else f"benchmarks.{Path(sys.argv[0]).stem}"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table under a heading; the first column is text, the others are figures."""
    print(f"### {title}\n")
    print(f"| {' | '.join(header)} |")
    print(f"|---|{'---:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print(flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0..1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

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
from typing import Any

__all__ = ["num_cores", "percentile", "print_setting", "print_table", "setting"]

_TELLING = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""Instruction sets that kernels are chosen by."""


def print_setting(*packages: str) -> None:
    """Print command, machine and versions, and what else the machine was doing."""
    found = setting(*packages)
    print(f"command: `{found['command']}`  ")
    load = ", ".join(f"{value:.1f}" for value in found["load"])
    print(f"machine: {found['processor']}, {found['cores']} cores usable, load average {load} at the start  ")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"versions: {versions}\n", flush=True)


def setting(*packages: str) -> dict[str, Any]:
    """The same, as values, and the instruction sets of the processor."""
    return {
        "command": f"python -m {_command_name()} {shlex.join(sys.argv[1:])}".rstrip(),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _TELLING if name in _cpuinfo("flags").split() + _cpuinfo("Features").split()],
        "cores": num_cores(),
        "load": list(os.getloadavg()),
        "versions": {"Python": platform.python_version()} | {package: _version(package) for package in packages},
    }


def _command_name() -> str:
    main = sys.modules["__main__"]
    return main.__spec__.name.removesuffix(".__main__") if main.__spec__ is not None else f"benchmarks.{Path(sys.argv[0]).stem}"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _cpuinfo(name: str) -> str:
    """A line of Linux's description of the first processor; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


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

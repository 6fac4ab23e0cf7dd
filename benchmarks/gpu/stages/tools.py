"""NVIDIA's own tools over one step of each kernel: what they say of memory, races and barriers, and what keeps the device busy.

Some machines have them not, or do not let them see the counters: then their rows say so.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import Row

__all__ = ["counters", "sanitizers"]

_STEP: Final = (sys.executable, "-m", "benchmarks.gpu.one_step")
_METRICS: Final = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores, %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of most",
    "launch__registers_per_thread": "registers",
}


def sanitizers(machine: Machine) -> Iterator[Row]:
    """Memory, races in shared memory, barriers, uninitialised memory."""
    if not machine.timed or shutil.which("compute-sanitizer") is None:
        yield {"tool": "compute-sanitizer", "says": "not here", "exit": None}
        return
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_STEP]
        code, said = _run(command, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        yield {"tool": tool, "says": (summary or said.splitlines() or [""])[-1].strip("= ")[:120], "exit": code}


def counters(machine: Machine) -> Iterator[Row]:
    """What ncu counts of the attention kernels at a size that fills the device."""
    if not machine.timed or shutil.which("ncu") is None:
        yield {"kernel": "ncu is not here"}
        return
    command = ["ncu", "--clock-control", "none", "--csv", "--metrics", ",".join(_METRICS), "-k", "regex:attn_", *_STEP, "--large"]
    code, said = _run(command, 80)
    lines = [line for line in said.splitlines() if line.startswith('"')]
    if code or not lines:
        yield {"kernel": f"ncu exits with {code}: {(said.splitlines() or ['it says nothing'])[-1][:120]}"}
        return
    rows: dict[str, Row] = {}
    for entry in csv.DictReader(io.StringIO("\n".join(lines))):
        row = rows.setdefault(entry["ID"], {"kernel": entry["Kernel Name"]})
        row[_METRICS.get(entry["Metric Name"], entry["Metric Name"])] = entry["Metric Value"]
    yield from rows.values()


def _run(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env={**os.environ, **variables}
        )
    except subprocess.TimeoutExpired:
        return 124, f"it takes longer than {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr

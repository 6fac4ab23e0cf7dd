"""Stages one after the other, each with a time box; what they find is written down as it is found.

A stage yields rows, dictionaries of plain values. It is asked for the next row as long as its box and the whole command's time
last. What goes wrong in it is written down too, and the next one begins; if the GPU is of no more use, in a new process.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from benchmarks.gpu.machine import Machine

__all__ = ["LostDeviceError", "Results", "Row", "Stage", "run_stages"]

Row = dict[str, Any]


class LostDeviceError(RuntimeError):
    """The device answers no more in this process."""


@dataclass(frozen=True)
class Stage:
    """A part of the command.

    Attributes:
        name: also of its table.
        seconds: of its box.
        run: yields rows.
    """

    name: str
    seconds: float
    run: Callable[[Machine], Iterator[Row]]


@dataclass
class Results:
    """What has been found, also in `results.json` and `results.md` of a folder."""

    folder: Path
    begun: float = field(default_factory=time)
    setting: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, folder: Path) -> Results:
        """What an earlier process left."""
        return cls(folder, **json.loads((folder / "results.json").read_text()))

    def write(self) -> None:
        """Both files, whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {name: getattr(self, name) for name in ("begun", "setting", "ceilings", "stages")}
        (self.folder / "results.json").write_text(json.dumps(parts, indent=1) + "\n")
        (self.folder / "results.md").write_text(self.tables())

    def tables(self) -> str:
        """Markdown, a table a stage."""
        lines = [f"{name}: {value}  " for name, value in self.setting.items()]
        for name, stage in self.stages.items():
            lines += ["", f"## {name} ({stage['seconds']:.0f} s)", "", *_table(stage["rows"])]
            lines += [f"\n**{stage['error']}**"] if stage.get("error") else []
        return "\n".join(lines) + "\n"


def run_stages(stages: Sequence[Stage], machine: Machine, results: Results, minutes: float) -> None:
    """Run those of which there are no results yet.

    Raises:
        LostDeviceError: go on in a new process.
    """
    machine.ceilings = results.ceilings
    for stage in stages:
        if stage.name in results.stages:
            continue
        left = results.begun + 60 * minutes - time()
        record: dict[str, Any] = {"seconds": 0.0, "rows": [], "error": None if left > 0 else "left out: no time"}
        results.stages[stage.name] = record
        if left > 0:
            print(f"{stage.name} ...", flush=True)
            _run(stage, machine, record, min(stage.seconds, left), results)
        results.write()
        _see_to_device(machine, record, results)


def _run(stage: Stage, machine: Machine, record: dict[str, Any], seconds: float, results: Results) -> None:
    begun = time()
    try:
        for row in stage.run(machine):
            record["rows"].append(row)
            record["seconds"] = time() - begun
            results.write()
            print("  " + "  ".join(f"{name} {_cell(value)}" for name, value in row.items()), flush=True)
            if time() - begun > seconds:
                record["error"] = f"its {seconds:.0f} s are over"
                break
    except Exception as error:  # a stage that fails must not take the others with it
        record["error"] = f"{type(error).__name__}: {error}"
        print(traceback.format_exc(), flush=True)
    record["seconds"] = time() - begun


def _see_to_device(machine: Machine, record: dict[str, Any], results: Results) -> None:
    try:
        machine.synchronize()
    except RuntimeError as error:
        record["error"] = record["error"] or str(error)
        results.write()
        raise LostDeviceError(str(error)) from error


def _table(rows: list[Row]) -> list[str]:
    """Rows of equal keys share a table."""
    lines: list[str] = []
    header: list[str] = []
    for row in rows:
        if list(row) != header:
            header = list(row)
            lines += ["", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""`make gpu-check` where there is no GPU: every stage runs over the emulator, and no time is made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks.gpu", reason="benchmarks are not there beside an installed wheel")

from benchmarks.gpu import one_step
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import LostDeviceError, Results, Row, Stage, run_stages
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.stages.whole_model import _rows as program_rows
from streamkv_kernels.emulated import EmulatedDevice

TIMES = (
    "µs",
    "GB/s",
    "TFLOP/s",
    "of reading",
    "of a product",
    "of copying",
    "faster",
    "seconds",
    "plain µs",
    "cascade µs",
    "host µs",
    "tok/s",
    "ITL p50 ms",
    "ITL p99 ms",
    "TTFT p50 ms",
    "TTFT ms",
    "of reading at one stream",
)


@pytest.fixture
def machine(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("STREAMKV_CACHE", str(libraries))
    return Machine(EmulatedDevice(cache=libraries, optimize=1), torch.device("cpu"), tiny=True)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_runs_without_a_gpu(machine: Machine, stage: Stage) -> None:
    with torch.inference_mode():
        rows = list(stage.run(machine))
    assert rows
    assert not [row for row in rows if "ended with" in row]
    assert all(row[name] is None for row in rows for name in TIMES if name in row)


def test_all_boxes_together_fit_the_time_of_the_command() -> None:
    assert sum(stage.seconds for stage in STAGES) <= 9 * 60


def test_a_program_that_takes_too_long_or_fails_says_so_after_its_rows() -> None:
    row = "print('{\"engine\": 1}', flush=True); "
    slow = list(program_rows([sys.executable, "-c", row + "import time; time.sleep(600)"], 2.0))
    assert slow == [{"engine": 1}, {"ended with": None, "note": "its 2 s are over"}]
    bad = list(program_rows([sys.executable, "-c", row + "raise ValueError('no')"], 60.0))
    assert bad == [{"engine": 1}, {"ended with": 1, "note": "ValueError: no"}]


def test_the_step_for_tools_runs_without_a_gpu(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMKV_CACHE", str(libraries))
    assert one_step.main(["--device", "emulated"]) == 0


def _two(_: Machine) -> Iterator[Row]:
    yield {"a": 1}
    yield {"a": 2.34567, "b": None}


def _bad(_: Machine) -> Iterator[Row]:
    yield {"a": 1}
    raise ValueError("no such thing")


def test_results_are_written_as_they_are_found(machine: Machine, tmp_path: Path) -> None:
    seen = []

    def look(_: Machine) -> Iterator[Row]:
        yield {"a": 1}
        seen.append(json.loads((tmp_path / "results.json").read_text())["stages"]["look"]["rows"])
        yield {"a": 2}

    run_stages([Stage("look", 5, look)], machine, Results(tmp_path), 1)
    assert seen == [[{"a": 1}]]


def test_a_stage_that_fails_leaves_its_rows_and_the_others(machine: Machine, tmp_path: Path) -> None:
    results = Results(tmp_path)
    run_stages([Stage("bad", 5, _bad), Stage("two", 5, _two)], machine, results, 1)
    assert results.stages["bad"]["rows"] == [{"a": 1}]
    assert results.stages["bad"]["error"] == "ValueError: no such thing"
    assert results.stages["two"]["error"] is None
    assert "| 2.346 | – |" in (tmp_path / "results.md").read_text()


def test_a_stage_ends_with_its_box_and_all_with_the_time(machine: Machine, tmp_path: Path) -> None:
    results = Results(tmp_path)
    run_stages([Stage("two", -1, _two)], machine, results, 1)
    assert len(results.stages["two"]["rows"]) == 1
    run_stages([Stage("late", 5, _two)], machine, results, 0)
    assert results.stages["late"] == {"seconds": 0.0, "rows": [], "error": "left out: no time"}


def test_a_lost_device_is_left_to_a_new_process(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Machine) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    results = Results(tmp_path)
    monkeypatch.setattr(Machine, "synchronize", lost)
    with pytest.raises(LostDeviceError):
        run_stages([Stage("two", 5, _two), Stage("next", 5, _two)], machine, results, 1)
    monkeypatch.undo()
    resumed = Results.resumed(tmp_path)
    run_stages([Stage("two", 5, _bad), Stage("next", 5, _two)], machine, resumed, 1)
    assert resumed.stages["two"]["error"] == "an illegal memory access was encountered"
    assert resumed.stages["next"]["error"] is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "emulated", "--tiny", "--out", str(tmp_path), "--only", "environment"]) == 0
    assert "| kernels | emulated |" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["setting"]["device"] == "emulated"

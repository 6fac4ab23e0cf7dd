"""`benchmarks.compare` and `benchmarks.growth` from end to end: real engines, a tiny model, real processes and sockets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks are not there beside an installed wheel")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments, "--quick", "--threads", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_engines_are_compared_and_who_is_missing_is_named(tmp_path: Path):
    done = _run(
        "benchmarks.compare",
        *("--only", "mixed32", "--peers", "generate", "llama-server", "--streamkv-backend", "torch"),
        *("--llama-server", str(tmp_path / "nowhere"), "--model-dir", str(tmp_path / "model"), "--out", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama-server is left out" in done.stdout
    assert "pip install" in done.stdout
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    measured = record["workloads"]["mixed32"]
    assert set(measured["rounds"]) == {"streamkv", "streamkv-ws", "generate"}
    assert all(each["rate"] > 0 for rounds in measured["rounds"].values() for each in rounds)
    (agreed,) = record["agreement"]
    assert (agreed["name"], agreed["agreed"], agreed["ok"]) == ("generate", agreed["tokens"], True)
    assert "<svg" in (tmp_path / "out" / "results.svg").read_text()


def test_growth_is_measured_and_drawn(tmp_path: Path):
    done = _run(
        "benchmarks.growth", "--axes", "streams", "--backend", "torch", "--model-dir", str(tmp_path), "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((tmp_path / "growth.json").read_text())["streams"]
    assert [point["x"] for point in points] == [1, 2]
    assert all(rate > 0 for point in points for rate in point["tok/s"])
    assert "<polyline" in (tmp_path / "streams.svg").read_text()

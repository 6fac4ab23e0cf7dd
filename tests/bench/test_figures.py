"""The figures that are claims, each for a few seconds: their commands fail if something is lost, left behind or leaked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks are not there beside an installed wheel")
@pytest.mark.parametrize("name", ["resume", "abort_storm", "drain", "fuzz"])
def test_the_claim_holds_for_a_few_seconds(name: str):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|---" in done.stdout

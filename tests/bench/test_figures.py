"""The figures that are claims, each for a few seconds: their commands fail if something is lost, left behind or leaked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks are not there beside an installed wheel")
@pytest.mark.parametrize("command", ["resume", "abort_storm", "drain", "fuzz", "server --idle 50 --flush-ms 20"])
def test_the_claim_holds_for_a_few_seconds(command: str):
    name, *options = command.split()
    program = [sys.executable, "-m", f"benchmarks.{name}", *options, "--quick"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|---" in done.stdout

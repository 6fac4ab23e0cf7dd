"""What `benchmarks.timeline` makes of a trace, and that a real server gives it one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("benchmarks.timeline", reason="benchmarks are not there beside an installed wheel")

from benchmarks.timeline import COLOURS, FORWARD, Span, by_size, draw, shares

ROOT = Path(__file__).parents[2]

TRACE = [
    Span("prepare", 0.0, 1.0),  # before the first pass: not counted
    Span(FORWARD, 1.0, 4.0),
    Span("sample", 4.0, 4.5),
    Span("plan", 1.5, 2.0),  # inside
    Span("send", 3.5, 4.5),  # half inside
    Span("prepare", 4.5, 5.0),
    Span("commit", 4.0, 6.0),  # half inside the second one
    Span(FORWARD, 5.0, 11.0),
    Span("sample", 11.0, 12.0),  # behind the last pass
]


def test_time_without_a_forward_pass_is_what_stands_between_them() -> None:
    found = shares(TRACE)
    assert found.steps == 2
    assert (found.forward, found.prepare, found.sample) == pytest.approx((0.9, 0.05, 0.05))
    assert found.loop == pytest.approx(3.5 / 10)
    assert found.overlap == pytest.approx((0.5 + 0.5 + 1.0) / 3.5)


def test_forward_passes_are_told_apart_by_their_size() -> None:
    passes = [(1, 0.02), (4, 0.04), (5, 0.06), (512, 0.28)]
    assert by_size(passes) == [["1–4", "2", "15%", "30.0"], ["5–16", "1", "15%", "60.0"], ["257–512", "1", "70%", "280.0"]]


def test_the_picture_shows_every_kind() -> None:
    picture = draw("a title & more", TRACE)
    fills = {element.get("fill") for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")}
    assert {COLOURS[kind] for kind in (FORWARD, "prepare", "sample", "plan", "send", "commit")} <= fills


def test_a_real_server_is_traced(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.timeline", "--quick"]
    options = ["--model-dir", str(tmp_path / "model"), "--svg", str(tmp_path / "steps.svg")]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| on |", "| off |"))]
    assert len(rows) == 2
    fills = {
        element.get("fill") for element in ElementTree.parse(tmp_path / "steps.svg").iter("{http://www.w3.org/2000/svg}rect")
    }
    assert set(COLOURS.values()) <= fills

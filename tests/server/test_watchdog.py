"""The watchdog: what it takes for a hang, and that it really ends one, in processes that really hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from streamkv.server.watchdog import COMPUTING, EXIT_STATUS, Hang
from tests.server.hanging import COMPUTING as CHILD_COMPUTING
from tests.server.serving import DEADLINE_S

LIMIT = 1.0
HANGS = [
    "forward_sleeps",
    "forward_deadlocks",
    "forward_spins",
    "forward_waits_for_a_stopped_process",
    "nobody_reads_stderr",
    "loop_sleeps",
    "loop_deadlocks",
    "loop_spins",
]
HEALTHY = ["slow", "computing", "idle", "parked", "stopped"]


# -- the decision, on made-up time -------------------------------------------------------------------------------------


class Watched:
    """Looks ten times a second."""

    def __init__(self, limit: float = 10.0) -> None:
        self.hang = Hang(limit)
        self.beat = 0
        self.step = 0

    def run(
        self, seconds: float, *, step: float | None = None, turns: bool = True, load: float = 0.0
    ) -> tuple[float, str | None]:
        """(seconds that passed, what hangs), looking for so long or until something does."""
        for tick in range(1, round(seconds * 10) + 1):
            self.beat += turns
            said = self.hang.look(step=step, beat=self.beat, elapsed=0.1, computed=0.1 * load)
            if said is not None:
                return tick / 10, said
        return seconds, None

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.step += 1
            assert self.run(seconds, step=self.step) == (seconds, None)


def test_a_step_that_does_nothing_hangs_after_the_limit():
    after, said = Watched().run(60, step=1.0)
    assert 10 <= after <= 10.5
    assert said == "one step of the engine has taken 10.1 s"


def test_a_loop_that_does_not_turn_hangs_after_the_limit_whatever_it_computes():
    for load in (0.0, 1.0):
        after, said = Watched().run(60, turns=False, load=load)
        assert 10 <= after <= 10.5
        assert said is not None
        assert "event loop" in said


def test_time_in_which_nobody_looked_does_not_count():
    hang = Hang(10.0)
    for turn in range(20):
        assert hang.look(step=1.0, beat=1, elapsed=3600.0, computed=0.0) is None or turn > 9


def test_no_step_is_no_hang():
    assert Watched().run(3600) == (3600, None)


def test_a_step_that_computes_gets_longer():
    after, said = Watched().run(10 * COMPUTING + 60, step=1.0, load=0.9)
    assert said is not None
    assert 10 * COMPUTING <= after <= 10 * COMPUTING + 1


def test_where_steps_are_slow_a_slower_one_is_no_hang():
    watched = Watched()
    watched.steps(5, seconds=8.0)
    after, said = watched.run(1000, step=-1.0)
    assert said is not None
    assert 20 * 7.9 <= after <= 20 * 8.1


@pytest.mark.parametrize("others", [0, 3, 20, 300])
def test_the_first_step_may_be_slow_without_setting_a_rule(others: int):
    watched = Watched()
    watched.steps(1, seconds=9.0)
    watched.steps(others, seconds=0.1)
    after, said = watched.run(1000, step=-1.0)
    assert said is not None
    assert after <= 10.5


def test_one_slow_step_among_many_does_not_change_the_limit():
    watched = Watched()
    watched.steps(1, seconds=9.0)
    watched.steps(300, seconds=0.2)
    after, said = watched.run(1000, step=-1.0)
    assert said is not None
    assert after <= 10.5


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass
class Child:
    mode: str
    process: subprocess.Popen[bytes]
    hung_at: float = 0.0
    helper: int = 0
    took: float = 0.0
    stderr: bytes = b""

    def expect(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline().decode():
            if line.startswith(word):
                return line.split()
        raise AssertionError(f"{self.mode} never said {word}: {self.process.stderr.read() if self.process.stderr else b''!r}")


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    """All of them at once, each ended by itself."""
    found: dict[str, Child] = {}
    try:
        for mode in [*HANGS, *HEALTHY]:
            command = [sys.executable, "-m", "tests.server.hanging", mode, str(LIMIT)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            found[mode] = Child(mode, process)
        stopped = found["stopped"]
        stopped.expect("hanging")
        os.kill(stopped.process.pid, signal.SIGSTOP)
        time.sleep(3 * LIMIT)
        os.kill(stopped.process.pid, signal.SIGCONT)
        yield found
    finally:
        for child in found.values():
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()
            for pipe in (child.process.stdout, child.process.stderr):
                if pipe is not None:
                    pipe.close()
            if child.helper:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.helper, signal.SIGKILL)


def end_of(child: Child) -> int:
    """Its status; what it said is in it."""
    if child.mode in HANGS:
        _, at, helper = child.expect("hanging")
        child.hung_at, child.helper = float(at), int(helper)
    if child.mode == "nobody_reads_stderr":
        status = child.process.wait(DEADLINE_S)
    else:
        _, child.stderr = child.process.communicate(timeout=DEADLINE_S)
        status = child.process.returncode
    return status


@pytest.mark.parametrize("mode", HANGS)
def test_a_process_that_hangs_ends_with_a_dump(children: dict[str, Child], mode: str):
    child = children[mode]
    assert end_of(child) == EXIT_STATUS
    if mode == "nobody_reads_stderr":
        return
    said = child.stderr.decode()
    assert "streamkv: watchdog: " in said
    assert ("the event loop has not turned" if mode.startswith("loop") else "one step of the engine") in said
    assert "Current thread" in said
    place = {"forward_waits_for_a_stopped_process": "wait", "forward_spins": "spin", "loop_spins": "spin"}.get(mode)
    assert f"in {place or ('deadlock' if 'deadlocks' in mode else 'sleep')}" in said


@pytest.mark.parametrize("mode", HEALTHY)
def test_a_process_that_is_slow_idle_or_was_stopped_lives(children: dict[str, Child], mode: str):
    child = children[mode]
    assert (end_of(child), child.stderr) == (0, b"")


def test_the_end_comes_in_time():
    """Limit and a little more; a step that computes has its own limit. By itself: the others compete for the processor."""
    for mode, limit in (("forward_sleeps", LIMIT), ("forward_spins", LIMIT * CHILD_COMPUTING)):
        command = [sys.executable, "-m", "tests.server.hanging", mode, str(LIMIT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            child = Child(mode, process)
            _, at, _ = child.expect("hanging")
            assert process.wait(DEADLINE_S) == EXIT_STATUS
            assert limit * 0.9 <= time.monotonic() - float(at) <= limit + 1.0 + 2.0  # two for a busy machine

"""A process with an engine and a watchdog that is made to hang: ``python -m tests.server.hanging MODE LIMIT_S``.

Prints `ready` once everything runs, then `hanging` with the monotonic time and the id of a helper process, if there is one.
Ends with status 0 if it was not ended before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from streamkv.engine.api import EngineRequest, Sampling
from streamkv.server.watchdog import Watchdog
from tests.engine.integers import integer_engine

COMPUTING = 4.0
"""How many times as long a step may take that computes."""

FOREVER = 3600.0


def say_hanging(helper: int = 0) -> None:
    # Not `print`: some of these hold its lock.
    os.write(1, f"hanging {time.monotonic()} {helper}\n".encode())


def deadlock() -> None:
    """On the locks that a careless watchdog would need."""
    lock = threading.Lock()
    lock.acquire()
    logging._acquireLock() if hasattr(logging, "_acquireLock") else logging._lock.acquire()
    say_hanging()
    lock.acquire()


def sleep() -> None:
    say_hanging()
    time.sleep(FOREVER)


def spin() -> None:
    say_hanging()
    while True:
        pass


def wait_for_a_stopped_process() -> None:
    helper = subprocess.Popen(["/bin/sleep", str(FOREVER)])
    os.kill(helper.pid, signal.SIGSTOP)
    say_hanging(helper.pid)
    helper.wait()


def deaf() -> None:
    """Nobody reads what is said, and there is no room for more."""
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(65536))
    except BlockingIOError:
        os.set_blocking(2, True)
    sleep()


def compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Steps:
    """What the runner does at each step."""

    def __init__(self, mode: str, limit: float) -> None:
        self.mode, self.limit, self.count = mode, limit, 0

    def __call__(self, _step: Any, _names: list[str]) -> frozenset[str]:
        self.count += 1
        in_forward: dict[str, Callable[[], None]] = {
            "forward_sleeps": sleep,
            "forward_deadlocks": deadlock,
            "forward_spins": spin,
            "forward_waits_for_a_stopped_process": wait_for_a_stopped_process,
            "nobody_reads_stderr": deaf,
        }
        if self.mode in in_forward and self.count == 3:
            in_forward[self.mode]()
        if self.mode == "slow":
            time.sleep(0.6 * self.limit)
        if self.mode == "computing" and self.count == 3:
            compute(2 * self.limit)
        if self.mode == "stopped" and self.count == 3:
            say_hanging()
            time.sleep(0.5 * self.limit)
        return frozenset()


async def main(mode: str, limit: float) -> None:
    watchdog = Watchdog(limit, computing=COMPUTING)
    try:
        async with integer_engine() as (engine, runner):
            runner.fault = Steps(mode, limit)
            watchdog.start(lambda: engine.computing_since)
            print("ready", flush=True)
            if mode == "idle":
                await asyncio.sleep(3 * limit)
            credit = 2 if mode == "parked" else None
            await engine.submit(EngineRequest(("a",), [1, 2, 3], Sampling(max_tokens=6), credit=credit))
            await read(engine, mode, limit)
    finally:
        watchdog.stop()


async def read(engine: Any, mode: str, limit: float) -> None:
    tokens = 0
    async for batch in engine.steps():
        tokens += sum(len(output.token_ids) for output in batch.outputs)
        if tokens >= 2 and mode.startswith("loop_"):
            {"loop_sleeps": sleep, "loop_deadlocks": deadlock, "loop_spins": spin}[mode]()
        if tokens == 2 and mode == "parked":
            await asyncio.sleep(3 * limit)
            await engine.credit("a", 100)
        if any(output.finish_reason for output in batch.outputs):
            assert tokens == 6
            return


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))

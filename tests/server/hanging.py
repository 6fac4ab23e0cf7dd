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

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Sampled, Step
from streamkv.engine.api import EngineInfo, EngineRequest, Sampling
from streamkv.engine.engine import InProcessEngine
from streamkv.engine.thread import Done, RunnerThread
from streamkv.server.watchdog import Watchdog

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
    helper = subprocess.Popen(["/bin/sleep", str(FOREVER)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class Runner:
    """Samples nothing but sevens; at some step it does what the mode says. (No numpy, no torch: many of these are started.)"""

    def __init__(self, mode: str, limit: float) -> None:
        self.mode, self.limit, self.count = mode, limit, 0

    def resume(self) -> None: ...

    def record_ahead(self) -> bool:
        return False

    def launch(self, step: Step, _params: Any) -> Done[Sampled]:
        self.count += 1
        self._misbehave()
        return Done(Sampled([(7,) if sampled else () for sampled in step.samples]))

    def _misbehave(self) -> None:
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


INFO = EngineInfo(
    model="sevens",
    max_model_len=128,
    vocab_size=8,
    eos_token_ids=(),
    block_size=4,
    num_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    backend="none",
    dtype="none",
    epoch="test",
)


async def main(mode: str, limit: float) -> None:
    watchdog = Watchdog(limit, computing=COMPUTING)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=128), KVCache(64, 4))
    engine = InProcessEngine(scheduler, Runner(mode, limit), RunnerThread(), INFO)
    engine.start()
    try:
        watchdog.start(engine.progress)
        print("ready", flush=True)
        if mode == "idle":
            await asyncio.sleep(3 * limit)
        credit = 2 if mode == "parked" else None
        await engine.submit(EngineRequest(("a",), [1, 2, 3], Sampling(max_tokens=6), credit=credit))
        await read(engine, mode, limit)
        await engine.close()
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

"""The runner's one thread: every torch call of an engine happens here, loading and warm-up included.

One thread means one OpenMP team and one current CUDA stream, and it leaves the event loop free to send while a step computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

__all__ = ["SWITCH_INTERVAL_S", "RunnerThread"]

P = ParamSpec("P")
T = TypeVar("T")

SWITCH_INTERVAL_S: Final = 0.001
"""How long the runner's Python code may hold the interpreter while the loop waits; see docs/benchmarks.md for the choice."""
FULL_COLLECTION_AFTER: Final = 100
"""Smaller collections before one that looks at every object; Python's own number is 10."""


class RunnerThread:
    """Runs functions one after the other in one thread of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="streamkv-runner")
        self._processor: int | None = None  # the thread's own clock
        self.busy_since: float | None = None
        """When the function that runs now was started, on the monotonic clock; None = none does. For any thread to read."""

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start `function` after everything submitted before; its result as a future of the running loop."""
        return asyncio.wrap_future(self._executor.submit(self._run, partial(function, *args, **kwargs)))

    def computed(self) -> float:
        """Seconds of processor time that the thread has used so far; of the process, where that cannot be told."""
        if self._processor is None:
            return time.process_time()
        with contextlib.suppress(OSError):
            return time.clock_gettime(self._processor)
        return 0.0  # it has ended

    def _run(self, call: Callable[[], T]) -> T:
        if self._processor is None and hasattr(time, "pthread_getcpuclockid"):
            self._processor = time.pthread_getcpuclockid(threading.get_ident())
        self.busy_since = time.monotonic()
        try:
            return call()
        finally:
            self.busy_since = None

    def close(self) -> None:
        """Wait for the function that runs, drop those that wait."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def use_short_switch_interval() -> None:
    """Make the interpreter switch threads more often than its default of 5 ms. For processes that serve sockets."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def make_full_collections_rare() -> None:
    """Have the interpreter look for cycles among all objects ten times as rarely as by default. For processes that serve sockets.

    With 5,000 connections each look takes a fifth of a second, in which nobody gets a token; cycles of young objects are found
    as soon as ever.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, FULL_COLLECTION_AFTER))

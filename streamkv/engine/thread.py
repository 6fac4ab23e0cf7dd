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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, ParamSpec, Protocol, TypeVar

__all__ = ["SWITCH_INTERVAL_S", "Done", "Pending", "RunnerThread"]

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

SWITCH_INTERVAL_S: Final = 0.001
"""How long the runner's Python code may hold the interpreter while the loop waits; see docs/benchmarks.md for the choice."""
FULL_COLLECTION_AFTER: Final = 100
"""Smaller collections before one that looks at every object; Python's own number is 10."""


class Pending(Protocol[T_co]):
    """What a launch leaves: a result that a device may still be computing."""

    def ready(self) -> bool:
        """Whether `collect` would not have to wait."""

    def collect(self) -> T_co:
        """The result; called once, in the runner's thread. Raises what the computation came to."""


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A result that is there."""

    value: T

    def ready(self) -> bool:
        """It is."""
        return True

    def collect(self) -> T:
        """The value."""
        return self.value


class RunnerThread:
    """Runs functions one after the other in one thread of its own.

    A result goes to the loop at once; but if the next function is waiting already, only when that one calls `deliver`, or ends:
    the loop's work on a result then falls into the computation that follows, instead of holding up what leads to it. A result
    that a device is still computing waits for the next function in any case, which must not wait for it; or for `flush`.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="streamkv-runner")
        self._processor: int | None = None  # the thread's own clock
        self._submitted = 0  # written by the loop's thread only
        self._started = 0  # written by the runner's thread only
        self._delivers = False
        self._held: Callable[[], None] | None = None
        self._told: Callable[[], None] | None = None
        self.busy_since: float | None = None
        """When the function that runs now was started, on the monotonic clock; None = none does. For any thread to read."""

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start `function` after everything submitted before; its result as a future of the running loop."""
        return self.launch(lambda: Done(function(*args, **kwargs)))

    def launch(self, function: Callable[P, Pending[T]], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start `function` after everything submitted before; what is collected of it, as a future of the running loop."""
        outcome: Future[T] = Future()
        self._submitted += 1
        running = self._executor.submit(self._run, outcome, partial(function, *args, **kwargs))
        running.add_done_callback(lambda done: outcome.cancel() if done.cancelled() else None)
        return asyncio.wrap_future(outcome)

    def flush(self) -> None:
        """Nothing follows for now: let the loop have the last result as soon as it is there."""
        self._executor.submit(self._wait)

    def deliver(self) -> None:
        """For the function that runs: it is about to compute for long, so let the loop have the result before its own."""
        self._delivers = True
        self._let_go()

    def computed(self) -> float:
        """Seconds of processor time that the thread has used so far; of the process, where that cannot be told."""
        if self._processor is None:
            return time.process_time()
        with contextlib.suppress(OSError):
            return time.clock_gettime(self._processor)
        return 0.0  # it has ended

    def _run(self, outcome: Future[T], call: Callable[[], Pending[T]]) -> None:
        if self._processor is None and hasattr(time, "pthread_getcpuclockid"):
            self._processor = time.pthread_getcpuclockid(threading.get_ident())
        self._started += 1
        if not outcome.set_running_or_notify_cancel():
            self._let_go()
            return
        self.busy_since = time.monotonic()
        pending: Pending[T] | None = None
        try:
            pending = call()
            finish = partial(_collect, outcome, pending)
        except BaseException as error:
            finish = partial(outcome.set_exception, error)
        self._let_go()
        self.busy_since = None
        self._held = finish
        # Where nobody calls `deliver`, a result would be held up for the whole time of the next function.
        if (pending is None or pending.ready()) and (not self._delivers or self._started == self._submitted):
            self._let_go()

    def _wait(self) -> None:
        self.busy_since = time.monotonic()
        self._let_go()
        self.busy_since = None

    def _let_go(self) -> None:
        if self._held is not None:
            # The one before is forgotten now: to free tensors lets go of the interpreter, and the loop, which has just been told,
            # would work before the next pass begins and not beside it.
            self._told, self._held = self._held, None
            self._told()

    def close(self) -> None:
        """Wait for the function that runs, drop those that wait."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._let_go()  # what was held for a function that was dropped


def _collect(outcome: Future[T], pending: Pending[T]) -> None:
    try:
        outcome.set_result(pending.collect())
    except BaseException as error:
        outcome.set_exception(error)


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

"""Ends a process that hangs, so that whoever started it starts another one: a dead server that holds its port helps nobody.

A thread of its own looks at two things: how long the engine's runner has been at one step, and when the event loop last
turned. It needs neither of them, no lock that others hold and no logging, only the interpreter.

    a step that uses the processor  is slow, not hung, even if others leave it little: it gets `COMPUTING` times as long
    a step that does not            hangs after the limit, or after 20 times what nearly all steps take here, if that is longer
    a loop that does not turn       hangs after the limit
    time in which this thread did not run either (a stopped process, a suspended machine) does not count
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["COMPUTING", "EXIT_STATUS", "Hang", "Watchdog", "end_process"]

EXIT_STATUS: Final = 70
"""EX_SOFTWARE of sysexits.h."""

COMPUTING: Final = 30.0
_BUSY: Final = 0.05
_STEPS_ALLOWED: Final = 20.0  # times the 99th percentile
_TICKS: Final = 20  # looks within the limit
_ENOUGH: Final = 5
_REMEMBERED: Final = 512


class Hang:
    """Decides. Pure: it is told what was seen, and how much time passed and was computed between two looks."""

    def __init__(self, limit_s: float, *, computing: float = COMPUTING) -> None:
        self._limit = limit_s
        self._computing = computing
        self._slow: deque[float] = deque(maxlen=_REMEMBERED)  # ages that finished steps had when last looked at
        self._step: float | None = None
        self._step_age = self._step_computed = 0.0
        self._beat = -1
        self._silence = 0.0

    def look(self, *, step: float | None, beat: int, elapsed: float, computed: float) -> str | None:
        """What hangs, in words; None if nothing does.

        Args:
            step: when the step began that is being computed, or None: any number that is another one for every step.
            beat: number of turns of the event loop.
            elapsed: seconds since the last look.
            computed: seconds of processor time that steps have used since then.
        """
        # Whoever looks late was stopped himself, and so was everybody else.
        elapsed = min(elapsed, 2 * self._limit / _TICKS)
        self._silence = 0.0 if beat != self._beat else self._silence + elapsed
        self._beat = beat
        if step is None or step != self._step:
            if self._step is not None:
                self._slow.append(self._step_age)
            self._step, self._step_age, self._step_computed = step, 0.0, 0.0
        else:
            self._step_age += elapsed
            self._step_computed += computed
        if self._silence > self._limit:
            return f"the event loop has not turned for {self._silence:.1f} s"
        if step is not None and self._step_age > self._allowed:
            return f"one step of the engine has taken {self._step_age:.1f} s"
        return None

    @property
    def _allowed(self) -> float:
        ages = sorted(self._slow)
        usual = 0.0
        if len(ages) >= _ENOUGH:
            # Of few steps one slow one, such as the very first, is no rule.
            usual = ages[math.ceil(0.99 * len(ages)) - 1] if len(ages) >= 100 else ages[len(ages) // 2]
        allowed = max(self._limit, _STEPS_ALLOWED * usual)
        return allowed * self._computing if self._step_computed > _BUSY * self._step_age else allowed


class Watchdog:
    """The thread."""

    def __init__(self, limit_s: float, *, computing: float = COMPUTING) -> None:
        """A limit of 0 makes one that does nothing."""
        self._limit = limit_s
        self._computing = computing
        self._progress: Callable[[], tuple[float | None, float]] = lambda: (None, 0.0)
        self._tick = limit_s / _TICKS
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamkv-watchdog", daemon=True)

    def start(self, progress: Callable[[], tuple[float | None, float]]) -> None:
        """Start looking; call it on the event loop, once the server is ready: what is loaded before may take as long as it takes.

        Args:
            progress: when the engine's present step began, or None, and the processor time that steps have used so far; must
                answer from any thread at any time.
        """
        if not self._limit:
            return
        self._progress = progress
        loop = asyncio.get_running_loop()

        def beat() -> None:
            self._beats += 1
            if not self._stop.is_set():
                loop.call_later(self._tick, beat)

        beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop looking, if it has ever begun."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        hang = Hang(self._limit, computing=self._computing)
        at, computed = time.monotonic(), self._progress()[1]
        while not self._stop.wait(self._tick):
            now, (step, used) = time.monotonic(), self._progress()
            reason = hang.look(
                step=step,
                beat=self._beats,
                elapsed=now - at,
                computed=used - computed,
            )
            at, computed = now, used
            if reason is not None:
                end_process(reason)


def end_process(reason: str) -> None:
    """Say why, show what every thread does, and be gone. Waits for nobody."""
    # Nobody may be reading: rather lose a part of the words than hang here as well.
    with contextlib.suppress(OSError, ValueError):
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.set_blocking(descriptor, False)
        os.write(descriptor, f"streamkv: watchdog: {reason}; the process ends with status {EXIT_STATUS}\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)
    os._exit(EXIT_STATUS)

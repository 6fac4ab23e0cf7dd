"""A program in a terminal of its own: what it prints is read, what a person types is written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.server.serving import DEADLINE_S

# The new session takes the terminal as its own: otherwise Ctrl-C would be a character and no signal.
_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "streamkv", *sys.argv[1:]])
"""

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Started by `terminal`."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.seen = ""
        self._unread = ""
        self._master = master

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def expect(self, text: str) -> str:
        """Wait until the program prints this; returns what came before it."""
        return await asyncio.to_thread(self._expect, text)

    def _expect(self, text: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self._unread:
            assert self._read(deadline), f"ended without {text!r}: {self.seen!r}"
        before, _, self._unread = self._unread.partition(text)
        return before

    def _read(self, deadline: float) -> bool:
        readable, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"silent for too long after {self.seen!r}"
        try:
            data = os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return False
        self.seen += data
        self._unread += data
        return bool(data)

    async def exit_status(self) -> int:
        """Read to the end and wait."""
        return await asyncio.to_thread(self._finish)

    def _finish(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline):
            pass
        return self.process.wait(DEADLINE_S)


@asynccontextmanager
async def terminal(*arguments: str) -> AsyncIterator[Terminal]:
    """`streamkv ARGUMENTS` in a new terminal, killed at the end if it still runs."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN_TERMINAL, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(master)

"""Our end of an engine's process.

Engines are kept apart because several thread pools in one process slow each other down even while they are idle, and because
their packages may not get along in one environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

__all__ = ["ROOT", "Apart", "PeerError", "apart", "environment"]

ROOT: Final = Path(__file__).resolve().parents[2]
START_S: Final = 600.0
"""Loading, and what is converted the first time."""


class PeerError(Exception):
    """An engine cannot be started, has failed, died or taken too long; one sentence says which."""


def environment(threads: int) -> dict[str, str]:
    """Variables of every engine's process: so many threads, and nothing that comes from a hub."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Apart:
    """A running engine. Made by `apart`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection, log: Path) -> None:
        self._process = process
        self._connection = connection
        self._log = log
        self.facts: dict[str, str] = {}
        """What it says of itself; set once, when it is ready."""

    def ask(self, message: Any, timeout_s: float) -> Any:
        """Send a message and wait for its answer.

        Raises:
            PeerError: no answer, or one that says what went wrong.
        """
        try:
            self._connection.send_bytes(json.dumps(message).encode())
            if not self._connection.poll(timeout_s):
                raise PeerError(f"has not answered for {timeout_s:.0f} s; see {self._log}")
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise PeerError(f"{self._end()}; see {self._log}") from error
        if "error" in answer:
            raise PeerError(f"{' '.join(answer['error'].split())[:300]}; see {self._log}")
        return answer["value"]

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(5)
            return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return "closed its connection"

    def close(self) -> None:
        """Ask it to end, then make it; also what it has started itself."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def apart(name: str, python: str, adapter: str, options: dict[str, Any], logs: Path) -> Iterator[Apart]:
    """Start an engine's process and wait until it is ready.

    Args:
        python: interpreter that has the engine.
        adapter: a module of `benchmarks.compare.adapters`.
        options: for its `opened`; `threads` is for all of them.
        logs: folder for what the process prints.

    Raises:
        PeerError: it did not become ready.
    """
    log = logs / f"{name}.log"
    ours, theirs = socket.socketpair()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.compare.worker", str(theirs.fileno()), adapter],
            cwd=ROOT,
            env=environment(options["threads"]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    theirs.close()
    peer = Apart(process, Connection(ours.detach()), log)
    try:
        peer.facts = peer.ask(options, START_S)
        yield peer
    finally:
        peer.close()

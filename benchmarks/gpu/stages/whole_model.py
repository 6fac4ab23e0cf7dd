"""A model end to end, StreamKV beside transformers: each in a process of its own, with a box of its own."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Final

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import Row
from benchmarks.gpu.whole_model import save_config

__all__ = ["whole_model"]

_SECONDS: Final = {"streamkv": 45.0, "served": 25.0, "generate": 20.0, "batching": 25.0}


def whole_model(machine: Machine) -> Iterator[Row]:
    """Tokens a second, gaps between tokens, first tokens; steps that wait for the device.

    Raises:
        AssertionError: launches of steps waited for the device.
    """
    if machine.timed:
        torch.cuda.empty_cache()  # the others need it
    waited = 0
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), tiny=machine.tiny)
        for engine, seconds in _SECONDS.items():
            command = [sys.executable, "-m", "benchmarks.gpu.whole_model", engine, "--folder", folder]
            command += ["--device", str(machine.place) if machine.timed else "emulated"]
            command += ["--tiny"] * machine.tiny + ["--read", str(machine.ceilings.get("read", 0.0))]
            for row in _rows(command, seconds):
                waited += row.get("that waited", 0)
                yield row if "engine" in row else {"engine": engine, **row}
    assert not waited, f"{waited} launches waited for the device"


def _rows(command: list[str], seconds: float) -> Iterator[Row]:
    """What a program prints, as it prints it; it is ended after so many seconds."""
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            yield from _lines(process, monotonic() + seconds)
            if process.wait():
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it says nothing"]
                yield {"ended with": process.returncode, "note": said[-1][:160]}
        except TimeoutError:
            yield {"ended with": None, "note": f"its {seconds:.0f} s are over"}
        finally:
            process.kill()


def _lines(process: subprocess.Popen[bytes], end: float) -> Iterator[Row]:
    assert process.stdout is not None
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - monotonic())):
                raise TimeoutError
            data = os.read(process.stdout.fileno(), 65536)
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):  # others write there too
                    yield json.loads(line)
            if not data:
                return

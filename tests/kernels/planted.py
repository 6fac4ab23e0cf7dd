"""Plants bugs in the kernels, one by one; each must be noticed, and in the way its list says.

    python -m tests.kernels.planted [part of a name ...]

A module `planted_*.py` beside this one holds `PLANTED`, its list, and `check(device)`, which launches the kernels and raises
AssertionError about numbers or counters. A bug is written into a copy of the sources and compiled for the emulator there.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from streamkv.errors import BackendError
from streamkv_kernels.device import SOURCES
from streamkv_kernels.emulated import EmulatedDevice, EmulatorError

__all__ = ["Noticed", "Planted", "plant", "verdicts"]

Noticed = Literal["numbers", "runtime", "checked"]
"""By `check`'s own assertions (about results, or the device's counters); by the emulator whatever the build; by the checked build
only, which then is the only one that runs."""


@dataclass(frozen=True)
class Planted:
    """A bug.

    Attributes:
        name: what is wrong.
        file: of the kernels' folder.
        old, new: texts; the old one is there exactly once.
        noticed: how it must be.
        says: a part of the emulator's sentence.
    """

    name: str
    file: str
    old: str
    new: str
    noticed: Noticed
    says: str = ""


def plant(bug: Planted, folder: Path) -> None:
    """Copy the sources to `folder`, with the bug.

    Raises:
        AssertionError: the old text is not there exactly once.
    """
    for path in SOURCES.iterdir():
        if path.suffix in {".cu", ".cuh", ".h"}:
            shutil.copy(path, folder)
    text = (folder / bug.file).read_text()
    count = text.count(bug.old)
    assert count == 1, f"the text of {bug.name!r} is {count} times in {bug.file}"
    (folder / bug.file).write_text(text.replace(bug.old, bug.new))


def _noticed(bug: Planted, check: Callable[[EmulatedDevice], None], libraries: Path) -> str | None:
    """Why the bug does not count as noticed, or None."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        plant(bug, Path(folder))
        device = EmulatedDevice(
            checked=bug.noticed == "checked", sources=Path(folder), cache=libraries, optimize=1, time_limit_s=10.0
        )
        try:
            check(device)
        except AssertionError as error:
            return None if bug.noticed == "numbers" else f"noticed by numbers only ({error})"
        except EmulatorError as error:
            if bug.noticed == "numbers":
                return f"noticed by the emulator: {error}"
            return None if bug.says in str(error) else f"the emulator says: {error}"
        except BackendError as error:
            return f"it does not compile: {error.message}"
        return "not noticed"


def verdicts(
    bugs: Iterable[Planted], check: Callable[[EmulatedDevice], None], libraries: Path
) -> Iterator[tuple[Planted, str | None, float]]:
    """Each bug, why it does not count as noticed, and the seconds it took; the kernels without a bug come first and must pass."""
    bugs = list(bugs)
    for checked in sorted({bug.noticed == "checked" for bug in bugs}):
        check(EmulatedDevice(checked=checked, cache=libraries, optimize=1))
    for bug in bugs:
        begun = time.monotonic()
        verdict = _noticed(bug, check, libraries)
        yield bug, verdict, time.monotonic() - begun


def main(parts: list[str]) -> int:
    """Plant all whose names have one of `parts`, and print a line each."""
    torch.set_num_threads(1)
    failed = count = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="libraries-") as libraries:
        for path in sorted(Path(__file__).parent.glob("planted_*.py")):
            module = importlib.import_module(f"tests.kernels.{path.stem}")
            bugs = [bug for bug in module.PLANTED if not parts or any(part in bug.name for part in parts)]
            for bug, verdict, seconds in verdicts(bugs, module.check, Path(libraries)):
                count += 1
                failed += verdict is not None
                word = "ok  " if verdict is None else "LOST"
                print(f"{word} {seconds:5.1f} s  {bug.file}: {bug.name} ({verdict or bug.noticed})", flush=True)
    print(f"{count - failed} of {count} planted bugs are noticed, {time.monotonic() - begun:.0f} s")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

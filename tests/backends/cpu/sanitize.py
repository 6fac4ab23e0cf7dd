"""The kernels under the compiler's sanitizers: ``make cpu-sanitize``.

The tests run as ever, over a library that g++ builds into a folder of its own, once for the best instruction set of this
processor and once for the portable one:

    address, undefined  torch's allocations have guarded edges too: a kernel that reads or writes beyond a tensor is reported
    thread              teams are of std::thread (gomp_threads.cpp), because what waits inside libgomp cannot be seen

The first report ends the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamkv_backends.cpu.build import ISAS, detect

TESTS = [f"tests/backends/cpu/test_{part}.py" for part in ("rows", "argmax", "linear", "tape", "attention")]


@dataclass(frozen=True)
class Sanitizer:
    """One way to build and to run.

    Attributes:
        flags: for g++, behind all others.
        library: to be loaded before everything else.
        left_out: tests, as pytest's -k has it; "every_instruction_set" is what the cases one by one have already shown.
        prefix: of the command.
    """

    name: str
    flags: str
    library: str
    environment: Mapping[str, str]
    left_out: str = "not every_instruction_set"
    prefix: tuple[str, ...] = ()


SANITIZERS = (
    Sanitizer(
        "address,undefined",
        "",
        "libasan.so",
        {
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until it ends
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
    ),
    Sanitizer(
        "thread",
        # Else the functions that torch has brought along would be taken.
        f"{Path(__file__).with_name('gomp_threads.cpp')} -Wl,-Bsymbolic",
        "libtsan.so",
        # torch's own team would look like a crowd that nothing orders.
        {"OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
        # One test tells torch how many threads there are, which is not asked here.
        "not every_instruction_set and not no_more_threads",
        # Its memory map leaves less room for chance than kernels take by now.
        ("setarch", "--addr-no-randomize"),
    ),
)


def library(name: str) -> str:
    """Where g++ has a library."""
    run = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def run(sanitizer: Sanitizer, isa: str, folder: Path) -> int:
    """The status of pytest: 0 if all tests passed and the sanitizer had nothing to say."""
    compiler = folder / f"cxx-{sanitizer.name}"
    flags = f"{sanitizer.flags} -O1 -g -fno-omit-frame-pointer -fsanitize={sanitizer.name}"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {flags}\n')
    compiler.chmod(0o700)
    cache = folder / sanitizer.name
    cache.mkdir(mode=0o700, exist_ok=True)
    environment = os.environ | {
        "CXX": str(compiler),
        "STREAMKV_CACHE": str(cache),
        "STREAMKV_CPU_ISA": isa,
        # The C++ library beside it: what is loaded later could not throw.
        "LD_PRELOAD": f"{library(sanitizer.library)} {library('libstdc++.so.6')}",
        **sanitizer.environment,
    }
    # -s: a report must not stay in what pytest has caught.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *TESTS, "-k", sanitizer.left_out]
    return subprocess.run([*sanitizer.prefix, *command], check=False, env=environment).returncode


def main() -> int:
    """0 if every run passed."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        for sanitizer in SANITIZERS:
            for isa in dict.fromkeys((detect(), ISAS[-1])):
                print(f"== {sanitizer.name}, {isa.name}", flush=True)
                if code := run(sanitizer, isa.name, Path(folder)):
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

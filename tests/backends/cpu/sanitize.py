"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make cpu-sanitize``.

The tests run as ever, over a library that g++ builds with both sanitizers into a folder of its own, once for the best
instruction set of this processor and once for the portable one. torch's allocations have guarded edges too: a kernel that
reads or writes beyond a tensor ends the run with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from streamkv_backends.cpu.build import ISAS, detect

TESTS = [f"tests/backends/cpu/test_{part}.py" for part in ("rows", "argmax", "linear", "tape", "attention")]
# What the cases one by one have already shown.
LEFT_OUT = "not every_instruction_set"


def library(name: str) -> str:
    """Where g++ has a library."""
    run = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def main() -> int:
    """0 if all tests passed and no sanitizer had anything to say."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        compiler = Path(folder) / "cxx"
        compiler.write_text('#!/bin/sh\nexec g++ "$@" -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined\n')
        compiler.chmod(0o700)
        for isa in dict.fromkeys((detect(), ISAS[-1])):
            print(f"== {isa.name}", flush=True)
            environment = os.environ | {
                "CXX": str(compiler),
                "STREAMKV_CACHE": folder,
                "STREAMKV_CPU_ISA": isa.name,
                # The C++ library beside it: what is loaded later could not throw.
                "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
                "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until it ends
                "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            }
            # -s: a report must not stay in what pytest has caught.
            command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *TESTS, "-k", LEFT_OUT]
            code = subprocess.run(command, check=False, env=environment).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

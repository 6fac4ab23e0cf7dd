"""Compiles the kernels for the instruction set of this machine, once, and finds them again.

Where a library comes from, in this order: `prebuilt/` beside this file (the wheel and the image have it), then the user's cache
folder (`streamkv.code_cache`), then the compiler. A library's name holds a digest of the sources, the flags and, outside the
wheel, the compiler, so that none is ever taken for another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamkv.code_cache import cache_folder, check_owner, write_whole
from streamkv.errors import BackendError

__all__ = ["ISAS", "InstructionSet", "cpu_flags", "detect", "find_or_build", "prebuild"]

_HERE: Final = Path(__file__).parent
_SOURCES: Final = _HERE / "kernels"
_PREBUILT: Final = _HERE / "prebuilt"
_FLAGS: Final = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi", "-Wno-maybe-uninitialized")
_TIMEOUT_S: Final = 300


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One way to compile the kernels.

    Attributes:
        flags: for the compiler.
        needs: flags of /proc/cpuinfo that the processor must have.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_AVX512_NEEDS: Final = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})
ISAS: Final = (
    InstructionSet(
        "amx",
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _AVX512_NEEDS | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    ),
    InstructionSet("avx512bf16", (*_AVX512, "-mavx512bf16"), _AVX512_NEEDS | {"avx512_bf16"}),
    InstructionSet("avx512", _AVX512, _AVX512_NEEDS),
    InstructionSet("avx2", ("-mavx2", "-mfma"), frozenset({"avx2", "fma"})),
    InstructionSet("portable", (), frozenset()),
)
"""Best first."""


def cpu_flags() -> frozenset[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def detect() -> InstructionSet:
    """The best of `ISAS` here; STREAMKV_CPU_ISA names a lesser one.

    Raises:
        BackendError: the named one is unknown, or this processor lacks it.
    """
    have = cpu_flags()
    possible = [isa for isa in ISAS if isa.needs <= have]
    asked = os.environ.get("STREAMKV_CPU_ISA")
    if not asked:
        return possible[0]
    for isa in possible:
        if isa.name == asked:
            return isa
    names = ", ".join(isa.name for isa in possible)
    raise BackendError(f"STREAMKV_CPU_ISA is {asked!r}, which this processor does not have; use one of {names}")


def find_or_build(isa: InstructionSet) -> Path:
    """The library for an instruction set, compiled if there is none yet.

    Raises:
        BackendError: there is no compiler, or it fails, or the cache folder is not safe; one sentence says what to do.
    """
    prebuilt = _PREBUILT / f"{isa.name}-{_digest(isa)}.so"
    if prebuilt.is_file():
        return prebuilt
    compiler = _compiler()
    if compiler is None:
        raise BackendError("the cpu backend needs a C++ compiler the first time; install g++ or clang++, or use --backend torch")
    folder = cache_folder()
    path = folder / f"cpu-{isa.name}-{_digest(isa, _version(compiler))}.so"
    if not path.exists():
        _compile(compiler, isa, path)
    check_owner(path)
    return path


def prebuild(folder: Path = _PREBUILT) -> list[Path]:
    """Compile every instruction set that the compiler can, for a wheel or an image.

    Raises:
        BackendError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise BackendError("no C++ compiler is found; install g++ or clang++")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for isa in ISAS if cpu_flags() else ISAS[-1:]:
        path = folder / f"{isa.name}-{_digest(isa)}.so"
        _compile(compiler, isa, path)
        made.append(path)
    return made


def _digest(isa: InstructionSet, compiler: str = "") -> str:
    digest = hashlib.sha256("\0".join((*_FLAGS, *isa.flags, compiler)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = (named,) if named else ("c++", "g++", "clang++")
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _version(compiler: str) -> str:
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)  # noqa: S603  # the user's own
    return run.stdout


def _compile(compiler: str, isa: InstructionSet, path: Path) -> None:
    write_whole(path, lambda part: _compile_to(compiler, isa, part))


def _compile_to(compiler: str, isa: InstructionSet, path: Path) -> None:
    sources = sorted(str(source) for source in _SOURCES.glob("*.cpp"))
    command = [compiler, *_FLAGS, *isa.flags, *sources, "-o", str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)  # noqa: S603  # the user's own
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{compiler} takes longer than {_TIMEOUT_S} s; use --backend torch") from error
    if run.returncode:
        first = next(iter(run.stderr.strip().splitlines()), "it says nothing")
        raise BackendError(f"{compiler} cannot compile the cpu backend for {isa.name} ({first}); use --backend torch")

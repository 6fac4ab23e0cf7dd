"""Compiles kernels for GPUs, with NVIDIA's own NVRTC and no GPU or driver, and finds them again.

Where a cubin comes from, in this order: `prebuilt/` beside this file (a wheel can have it), then the user's cache folder
(`streamkv.code_cache`), then NVRTC, which needs no header and no toolkit: `pip install 'streamkv[gpu]'`. A cubin's name holds a
digest of its source, the headers, the macros, the architecture and, outside `prebuilt/`, the compiler's version.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from streamkv.code_cache import cache_folder, check_owner, write_whole
from streamkv.errors import BackendError
from streamkv_kernels.device import SOURCES, Variant

__all__ = ["ARCHITECTURES", "Resources", "architecture_for", "compile_cubin", "find_or_build", "prebuild"]

ARCHITECTURES: Final = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What kernels are compiled for: a GPU runs those of its own generation up to its own number."""

_PREBUILT: Final = Path(__file__).parent / "prebuilt"
_OPTIONS: Final = ("-std=c++17", "-Xptxas=-v")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread keeps in memory because registers are short, written or read.
        stack: bytes of a thread.
        shared: static bytes of a block; what a launch asks for comes on top.
    """

    registers: int
    spilled: int
    stack: int
    shared: int


def architecture_for(capability: tuple[int, int]) -> str:
    """The best of `ARCHITECTURES` that a GPU of a compute capability runs.

    Raises:
        BackendError: it runs none.
    """
    major, minor = capability
    fitting = [name for name in ARCHITECTURES if int(name[3:-1]) == major and int(name[-1]) <= minor]
    if not fitting:
        raise BackendError(
            f"the cuda backend has no kernels for GPUs of compute capability {major}.{minor}, only for those of "
            f"{', '.join(f'{name[3:-1]}.{name[-1]}' for name in ARCHITECTURES)} and their relatives; use --backend torch"
        )
    return fitting[-1]


def find_or_build(variant: Variant, architecture: str) -> Path:
    """The cubin of a variant, compiled if there is none yet.

    Raises:
        BackendError: there is no compiler, it refuses the source, or the cache folder is not safe.
    """
    prebuilt = _PREBUILT / _file_name(variant, architecture)
    if prebuilt.is_file():
        return prebuilt
    path = cache_folder() / _file_name(variant, architecture, compiler_version())
    if not path.exists():
        cubin, _ = compile_cubin(variant, architecture)
        write_whole(path, partial(Path.write_bytes, data=cubin))
    check_owner(path)
    return path


def prebuild(variants: Iterable[Variant], architectures: Iterable[str] = ARCHITECTURES, folder: Path = _PREBUILT) -> list[Path]:
    """Compile variants for a wheel.

    Raises:
        BackendError: there is no compiler, it refuses a source, or there are no kernels for an architecture.
    """
    architectures = list(architectures)
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise BackendError(f"there are no kernels for {architecture!r}, only for {', '.join(ARCHITECTURES)}")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for variant in variants:
        for architecture in architectures:
            path = folder / _file_name(variant, architecture)
            cubin, _ = compile_cubin(variant, architecture)
            write_whole(path, partial(Path.write_bytes, data=cubin))
            made.append(path)
    return made


def compile_cubin(variant: Variant, architecture: str) -> tuple[bytes, dict[str, Resources]]:
    """Compile a variant.

    Args:
        architecture: like `sm_90`, or `sm_90a` for what only that generation has.

    Returns:
        The cubin, and the resources of its kernels by name.

    Raises:
        BackendError: there is no compiler, or it refuses the source.
    """
    core = _core()
    source = SOURCES / f"{variant.source}.cu"
    options = core.ProgramOptions(
        name=source.name,
        std="c++17",
        arch=architecture,
        include_path=str(SOURCES),
        ptxas_options=["-v"],
        define_macro=[(name, str(value)) for name, value in variant.defines] or None,
    )
    log = io.StringIO()
    try:
        code = core.Program(source.read_text(), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # whose class belongs to the package's private part
        lines = [line for line in str(error).splitlines() if ": error:" in line] or [repr(error)]
        raise BackendError(f"NVRTC cannot compile {variant} for {architecture}: {lines[0].strip()}") from error
    return bytes(code), _resources(log.getvalue())


def compiler_version() -> str:
    """NVRTC's.

    Raises:
        BackendError: there is none.
    """
    _core()
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _core() -> Any:
    """The package that compiles; it is imported when something has to be compiled, and not before."""
    try:
        from cuda import core
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package, or a missing library within
        raise BackendError("the CUDA kernels are compiled by NVRTC, which is missing; pip install 'streamkv[gpu]'") from error
    return core


def _file_name(variant: Variant, architecture: str, compiler: str = "") -> str:
    return f"{variant.source}-{architecture}-{variant.digest(architecture, compiler, *_OPTIONS)}.cubin"


def _resources(log: str) -> dict[str, Resources]:
    """Read what ptxas says of each function, in the order it says it."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert name is not None and registers is not None and memory is not None, part  # noqa: PT018  # the log has all or is another's
        spilled = int(memory[2]) + int(memory[3])
        found[name[1]] = Resources(int(registers[1]), spilled, int(memory[1]), int(shared[1]) if shared else 0)
    return found

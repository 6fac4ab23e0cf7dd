"""Runs the kernels on a processor: the same sources, compiled by g++ over `emulator.h`, on torch's CPU tensors.

A launch that does what it must not raises EmulatorError; the process, and the next launch, are none the worse for it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_double, c_int, c_uint, c_uint64, c_void_p, cast, pointer
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch

from streamkv.code_cache import cache_folder, check_owner, write_whole
from streamkv.errors import BackendError
from streamkv_kernels.device import SOURCES, Argument, Grid, Variant

__all__ = ["EmulatedDevice", "EmulatedKernel", "EmulatorError", "Schedule"]

_LANGUAGE: Final = ("-std=c++20", "-x", "c++", "-DSKV_EMU", "-Wall", "-Wextra", "-Werror=uninitialized", "-Wno-unknown-pragmas")
_CODE: Final = ("-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-threadsafe-statics")
_FIBERS: Final = ("-fstack-clash-protection", "-U_FORTIFY_SOURCE", "-fno-optimize-sibling-calls")
"""A stack has one guard page; we jump out of fibers; and return addresses say where a kernel is."""
_FLAGS: Final = (*_LANGUAGE, *_CODE, *_FIBERS)
_CHECKED_FLAGS: Final = ("-fsanitize=thread", "-fno-omit-frame-pointer")
_TIMEOUT_S: Final = 300
_ORDERS: Final = {"oldest": 0, "newest": 1, "random": 2}


class _Extent(Structure):
    _fields_ = [("begin", c_uint64), ("end", c_uint64)]


_COUNTERS: Final = (
    *("mma", "ldmatrix", "ldmatrix_wavefronts", "copies", "shuffles", "exponentials", "block_barriers", "warp_barriers"),
    *("switches", "shared_wavefronts", "least_shared_wavefronts", "global_sectors", "least_global_sectors"),
)


class _Counters(Structure):
    _fields_ = [(name, c_uint64) for name in _COUNTERS]


class _Failure(Structure):
    _fields_ = [
        ("block", c_uint * 3), ("thread", c_int), ("where", c_uint64), ("other_where", c_uint64), ("what", c_char * 240),
    ]  # fmt: skip  # in the order of the struct


class _Launch(Structure):
    _fields_ = [
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint),
        ("order", c_int), ("early_copies", c_int), ("record_traffic", c_int), ("seed", c_uint64),
        ("time_limit_s", c_double), ("num_extents", c_uint64), ("extents", POINTER(_Extent)),
        ("counters", POINTER(_Counters)), ("failure", POINTER(_Failure)),
    ]  # fmt: skip  # in the order of the struct


class EmulatorError(RuntimeError):
    """A kernel did what it must not.

    Attributes:
        kernel: its name.
        block: index of the block.
        thread: number of the thread within the block.
        line: `file.cu:12` where it stood.
        what: one clause.
    """

    def __init__(self, kernel: str, block: Grid, thread: int, line: str, what: str, other: str | None = None) -> None:
        beside = f" (the other thread: {other})" if other else ""
        super().__init__(f"{kernel}, block {block}, thread {thread}, {line}: {what}{beside}")
        self.kernel, self.block, self.thread, self.line, self.what = kernel, block, thread, line, what


@dataclass(frozen=True, slots=True)
class Schedule:
    """In which order threads go on, which no result may depend on.

    Attributes:
        order: of those that can, the one that waits longest goes on; or the newest, so that a warp runs as far as it can and
            blocks run from the last to the first; or any one by `seed`.
        early_copies: a cp.async copies at once and not when it is waited for.
    """

    order: Literal["oldest", "newest", "random"] = "oldest"
    seed: int = 0
    early_copies: bool = False


@dataclass
class EmulatedDevice:
    """The kernels on this processor.

    Attributes:
        checked: whether every load and store is looked at: races, ranges, alignment. Some ten times slower.
        sources: where `.cu` files and headers are looked for, before the package's own folder.
        cache: where compiled libraries are kept; None = the user's cache folder.
        optimize: level of g++: 1 compiles faster, 2 runs faster.
        time_limit_s: of a launch.
        record_traffic: count wavefronts of shared and sectors of global memory too, in a checked device.
        machine_defines: macros of `emulator.cpp`.
        counters: what the latest launch did; `emulator.h` says of each what it counts.
        on_launch: told of every launch, by what repeats it: what stands in for a CUDA graph records them.
    """

    checked: bool = False
    schedule: Schedule = Schedule()
    sources: Path = SOURCES
    cache: Path | None = None
    num_sms: int = 4
    optimize: int = 2
    time_limit_s: float = 60.0
    record_traffic: bool = False
    machine_defines: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    on_launch: Callable[[Callable[[], None]], None] | None = None
    _libraries: dict[Variant, _Library] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return "emulated, checked" if self.checked else "emulated"

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> EmulatedKernel:
        """A function of a variant; `Device.kernel`.

        Raises:
            BackendError: there is no g++, or it refuses the source.
        """
        library = self._libraries.get(variant)
        if library is None:
            library = self._libraries[variant] = _Library(self._find_or_build(variant))
        if not hasattr(library.native, f"emu_{name}"):
            raise BackendError(f"{variant.source}.cu has no SKV_EXPORT({name})")
        return EmulatedKernel(self, library, name, shared_bytes)

    def _find_or_build(self, variant: Variant) -> Path:
        compiler = shutil.which("g++")
        if compiler is None:
            raise BackendError("emulated kernels need g++, which is not installed")
        folder = self.cache or cache_folder()
        flags = (f"-O{self.optimize}", *_FLAGS, *(_CHECKED_FLAGS if self.checked else ()), *variant.flags)
        version = _run([compiler, "--version"])
        machine = self._machine(compiler, version, folder)
        digest = variant.digest(*flags, version, machine.name, folders=(self.sources, SOURCES))
        path = folder / f"emulated-{variant.source}-{digest}.so"
        if not path.exists():
            write_whole(path, lambda part: self._compile(compiler, flags, variant, machine, part))
        check_owner(path)
        return path

    def _machine(self, compiler: str, version: str, folder: Path) -> Path:
        """The emulator itself, compiled once for all kernels, and never looked at by its own hooks."""
        flags = ("-O2", *_FLAGS, f"-DEMU_CHECKED={int(self.checked)}", *(f"-D{name}" for name in self.machine_defines))
        path = folder / f"emulator-{Variant('emulator').digest(*flags, version)}.o"
        if not path.exists():
            command = [compiler, *flags, f"-I{SOURCES}", "-c", str(SOURCES / "emulator.cpp"), "-o"]
            write_whole(path, lambda part: _run([*command, str(part)]))
        check_owner(path)
        return path

    def _compile(self, compiler: str, flags: tuple[str, ...], variant: Variant, machine: Path, path: Path) -> None:
        """In two steps, so that a checked library is linked without libtsan: its hooks are the emulator's."""
        object_file = path.with_suffix(".o")
        include = [f"-I{self.sources}", f"-I{SOURCES}"]
        try:
            _run([compiler, *flags, *include, "-c", str(self.sources / f"{variant.source}.cu"), "-o", str(object_file)])
            _run([compiler, "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", str(object_file), str(machine), "-o", str(path)])
        finally:
            object_file.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)  # noqa: S603  # g++ and addr2line
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
        raise BackendError(f"{Path(command[0]).name} fails: {errors[0] if errors else 'it says nothing'}")
    return run.stdout


class _Library:
    """A compiled variant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.native: Any = ctypes.CDLL(str(path))
        self.native.emu_base.restype = c_uint64

    def line(self, where: int) -> str:
        """The line of a kernel that an address in a failure belongs to: the innermost that is not the device layer's."""
        address = (self.native.emu_base() + where - 1) % 2**64  # the call, not what it returns to
        addr2line = shutil.which("addr2line")
        if addr2line is None:
            return f"address {address:#x}"
        frames = _run([addr2line, "-i", "-e", str(self.path), hex(address)]).splitlines()
        lines = [Path(frame.split(" ")[0]).name for frame in frames]
        outside = [line for line in lines if not line.startswith(("emulator.h", "device.cuh", "??"))]
        return (outside or lines or ["??"])[0]


class EmulatedKernel:
    """A function of a library."""

    def __init__(self, device: EmulatedDevice, library: _Library, name: str, shared_bytes: int) -> None:
        self.device, self.library, self.name, self.shared_bytes = device, library, name, shared_bytes
        self.function: Any = getattr(library.native, f"emu_{name}")
        signature = getattr(library.native, f"emu_signature_{name}")
        signature.restype = c_char_p
        self.parameters: list[str] = signature().decode().split()

    def bind(self, *arguments: Argument) -> EmulatedBound:
        """Pack the arguments.

        Raises:
            TypeError: they are not what the kernel's signature says: on a GPU they would be misread.
        """
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        for number, (argument, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            if not _fits(argument, parameter):
                given = argument.dtype if isinstance(argument, torch.Tensor) else type(argument).__name__
                raise TypeError(
                    f"argument {number} of {self.name} is {given}, and the kernel has {_WORDS[parameter[0]]} ({parameter}) there"
                )
        return EmulatedBound(self, arguments)

    def launch(self, grid: Grid, block: Grid, *arguments: Argument) -> None:
        """Bind, and launch once."""
        self.bind(*arguments).launch(grid, block)


_WORDS: Final = {"p": "a pointer", "l": "a long long", "d": "a double"}


def _fits(argument: Argument, parameter: str) -> bool:
    if isinstance(argument, torch.Tensor):
        # Raw bytes may be taken for anything, as a pool is.
        return parameter[0] == "p" and (argument.dtype is torch.uint8 or argument.itemsize == int(parameter[1:]))
    if argument is None:
        return parameter[0] == "p"
    return parameter == {int: "l", float: "d"}.get(type(argument))


class EmulatedBound:
    """Packed arguments of a kernel."""

    def __init__(self, kernel: EmulatedKernel, arguments: tuple[Argument, ...]) -> None:
        self.kernel = kernel
        self._arguments = arguments  # keeps the tensors alive
        self._values = [_value(argument) for argument in arguments]
        self._pointers = (c_void_p * max(1, len(arguments)))(*(cast(pointer(value), c_void_p) for value in self._values))
        extents = [extent for argument in arguments if isinstance(argument, torch.Tensor) for extent in _extents(argument)]
        self._num_extents = len(extents)
        self._extents = (_Extent * max(1, len(extents)))(*extents)

    def launch(self, grid: Grid, block: Grid) -> None:
        """Run it.

        Raises:
            EmulatorError: it did what it must not.
            ValueError: no GPU could launch this.
        """
        kernel, device = self.kernel, self.kernel.device
        threads = block[0] * block[1] * block[2]
        if threads % 32 or not 0 < threads <= 1024:
            raise ValueError(f"{kernel.name}: blocks of {threads} threads; they are whole warps, and at most 1024")
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise ValueError(f"{kernel.name}: no grid of {grid} blocks can be launched")
        if not 0 <= kernel.shared_bytes <= 227 * 1024:
            raise ValueError(f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory; a block can have 232448 at most")
        counters, failure = _Counters(), _Failure()
        launch = _Launch(
            grid, block, kernel.shared_bytes, _ORDERS[device.schedule.order], device.schedule.early_copies,
            device.record_traffic, device.schedule.seed, device.time_limit_s, self._num_extents, self._extents,
            pointer(counters), pointer(failure),
        )  # fmt: skip  # in the order of the struct
        failed = kernel.function(byref(launch), self._pointers)
        device.counters = {name: getattr(counters, name) for name in _COUNTERS}
        if failed:
            raise self._error(failure)
        if device.on_launch is not None:
            device.on_launch(partial(self.launch, grid, block))

    def _error(self, failure: _Failure) -> EmulatorError:
        line = self.kernel.library.line
        other = line(failure.other_where) if failure.other_where else None
        block = (failure.block[0], failure.block[1], failure.block[2])
        return EmulatorError(self.kernel.name, block, failure.thread, line(failure.where), failure.what.decode(), other)


def _value(argument: Argument) -> Any:
    if isinstance(argument, torch.Tensor):
        return c_void_p(argument.data_ptr())
    if argument is None:
        return c_void_p(None)
    return c_double(argument) if isinstance(argument, float) else ctypes.c_longlong(argument)


def _extents(tensor: torch.Tensor) -> Iterator[_Extent]:
    """The bytes from a tensor's first element to its last."""
    if tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield _Extent(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize)

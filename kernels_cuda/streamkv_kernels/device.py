"""What runs kernels: one seam for a GPU and for the emulator, so that the same host code serves both.

    kernel = device.kernel(Variant("attn_decode", (("HEAD_DIM", 64),)), "attn_decode", shared_bytes=32768)
    bound = kernel.bind(query, pool, None, 16, 0.125)    # packed once; tensors are kept alive
    bound.launch((num_blocks, 1, 1), (128, 1, 1))        # as often as wanted, on torch's current stream

Scalar parameters of kernels are `long long` (int here) or `double` (float); pointers are tensors, or None for a null pointer.
What a kernel needs of shapes, strides and dtypes its wrapper checks before it launches; here nothing is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch

__all__ = ["SOURCES", "Argument", "Bound", "Device", "Grid", "Kernel", "Variant"]

SOURCES: Final = Path(__file__).parent
"""Where the kernels' sources are."""

Argument = torch.Tensor | int | float | None
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a source.

    Attributes:
        source: name of the file without `.cu`.
        defines: macros, `-Dname=value` each.
    """

    source: str
    defines: tuple[tuple[str, int | str], ...] = ()

    def __str__(self) -> str:
        return " ".join((self.source, *self.flags))

    @property
    def flags(self) -> tuple[str, ...]:
        """The macros as compilers take them."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)

    def digest(self, *others: str, folders: Sequence[Path] = (SOURCES,)) -> str:
        """Of the source, of all headers beside it, of the macros, and of whatever else decides what is compiled."""
        digest = hashlib.sha256("\0".join((*self.flags, *others)).encode())
        for folder in folders:
            own = (folder / f"{self.source}.cu", folder / f"{self.source}.cpp")
            for path in (*own, *sorted(folder.glob("*.cuh")), *sorted(folder.glob("*.h"))):
                if path.is_file():
                    digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


class Bound(Protocol):
    """A kernel with its arguments."""

    def launch(self, grid: Grid, block: Grid) -> None:
        """Run it: `grid` blocks of `block` threads, whole warps."""


class Kernel(Protocol):
    """A compiled function."""

    def bind(self, *arguments: Argument) -> Bound:
        """Pack arguments for many launches. Tensors are kept alive; their addresses must stay."""

    def launch(self, grid: Grid, block: Grid, *arguments: Argument) -> None:
        """Bind, and launch once."""


class Device(Protocol):
    """Compiles kernels and runs them."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def num_sms(self) -> int:
        """Multiprocessors: how many blocks it takes to fill the device."""

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> Kernel:
        """A function of a variant, to be launched with so much dynamic shared memory.

        Raises:
            BackendError: it cannot be compiled or loaded.
        """

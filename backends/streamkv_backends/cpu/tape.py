"""What a forward pass does, written down while it runs, to be run again without its Python: the processor's CUDA graph.

The pass runs once under a `Tape`. Native calls add themselves; operations of torch in between are seen by a dispatch mode.
Views need nothing, they are addresses already; an addition becomes a native call; any other operation is called again with the
same tensors, and its result copied to where it lay. Buffers for results come from the tape's arena and go back to it
when nobody holds them any more, so a step needs as much memory as it has live at once.

Where Python was told a value, and may have decided by it, the value must come again, or the recording is not the pass. A pass
that reads whole tensors into Python (`tolist`) is not recorded: nobody sees what it does with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamkv_backends.cpu.native import Add, Op
from streamkv_backends.taped import FRESH, OtherPathError, TorchCall, is_view, tensors_in

__all__ = ["KINDS", "Arena", "Recorded", "Tape"]

KINDS: Final = {"attend": 0, "linear": 1, "norm": 2, "gate": 3, "add": 4, "rotate": 5}
_ALIGN: Final = 64
_use_count: Final[Callable[[int], int]] = torch._C._storage_Use_Count  # noqa: SLF001  # as torch's own CUDA graph trees do


class Arena:
    """Buffers by size; one is handed out again when only the arena holds it."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[_Buffer]] = {}
        self.num_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose content is arbitrary."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = max(_ALIGN, -(-count * dtype.itemsize // _ALIGN) * _ALIGN)
        buffers = self._buffers.setdefault(num_bytes, [])
        for buffer in buffers:
            if buffer.is_free():
                break
        else:
            buffer = _Buffer(num_bytes)
            buffers.append(buffer)
            self.num_bytes += num_bytes
        return buffer.tensor.view(dtype)[:count].view(shape)


class _Buffer:
    """Memory that knows whether anybody else holds it."""

    __slots__ = ("_idle", "_storage", "tensor")

    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8)
        self._storage = self.tensor.untyped_storage()
        # Asked for, not known: how often torch itself counts the storage's Python object differs between its versions.
        self._idle = _use_count(self._storage._cdata)  # noqa: SLF001  # see above

    def is_free(self) -> bool:
        return _use_count(self._storage._cdata) == self._idle  # noqa: SLF001  # see above


class Recorded:
    """A pass that can be run again with other inputs of the same shapes."""

    def __init__(
        self, native: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, tape: Tape, threads: int, pool: int
    ) -> None:
        """Take over what a tape has collected.

        Args:
            threads: most that it may be run by: as many as its scratch was measured for.
            pool: which of its backend's pools it attends to.
        """
        self._native = native
        self._inputs, self._output, self._threads = inputs, output, threads
        self.pool = pool
        self._keep: list[Any] = [tape.arena, tape.fresh]
        self._parts: list[tuple[Any, int] | TorchCall] = []
        self.num_bytes = tape.arena.num_bytes
        self.num_native = self.num_torch = 0
        self.seconds: Any = None  # an array of doubles, by `KINDS`: where native operations add up their time
        run: list[tuple[int, Any]] = []
        for part in [*tape.parts, None]:
            if isinstance(part, tuple):
                run.append(part)
                continue
            if run:
                operations = (Op * len(run))(*(Op(kind, ctypes.addressof(call)) for kind, call in run))
                self._parts.append((operations, len(run)))
                self._keep.append(list(run))
                self.num_native += len(run)
                run = []
            if part is not None:
                self._parts.append(part)
                self.num_torch += 1

    def replay(self, inputs: tuple[torch.Tensor, ...], plans: Any) -> torch.Tensor | None:
        """Run again; the result is overwritten by the next run. None = this step has to go through Python.

        Args:
            plans: addresses of the step's attention plans, by shape.
        """
        for to, value in zip(self._inputs, inputs, strict=True):
            to.copy_(value)
        try:
            for part in self._parts:
                if isinstance(part, tuple):
                    self._native.skv_run(part[0], part[1], plans, self._threads, self.seconds)
                else:
                    part.again()
        except OtherPathError:
            return None
        return self._output


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Collects what a pass does while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.parts: list[tuple[int, Any] | TorchCall] = []
        self.arena = Arena()
        self.fresh: list[torch.Tensor] = []  # memory that no recorded operation gives: made of Python's numbers, or empty

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, seconds long, to keep it away from here."""
        return False

    def native(self, kind: str, call: Any) -> None:
        """A native call was made.

        What it points to stays where it is: weights are the model's, results of torch's operations are kept with those, `fresh`
        is kept too, and the arena's buffers are recycled in the order of the calls, which is the order in which they run again.
        """
        self.parts.append((KINDS[kind], call))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation below Python."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and _plain_add(args, kwargs):
            left, right = args
            out = self.arena.empty(tuple(left.shape), left.dtype)
            self.native("add", Add(left.data_ptr(), right.data_ptr(), out.data_ptr(), left.numel()))
            return torch.ops.aten.add.out(left, right, out=out)
        result = func(*args, **kwargs)
        if func in FRESH:
            self.fresh.append(result)
            return result
        if is_view(func, tensors_in((args, tuple(kwargs.values()))), tensors_in(result)):
            return result
        self.parts.append(TorchCall(func, args, kwargs, result))
        return result


def _plain_add(args: Any, kwargs: Any) -> bool:
    if len(args) != 2 or kwargs or not all(isinstance(arg, torch.Tensor) for arg in args):
        return False
    left, right = args
    return (
        left.dtype is right.dtype is torch.bfloat16
        and left.shape == right.shape
        and left.is_contiguous()
        and right.is_contiguous()
        and left.numel() % 16 == 0
    )

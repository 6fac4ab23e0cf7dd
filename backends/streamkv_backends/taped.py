"""What torch does in a forward pass, to be done again: calls of its operations, seen from below Python.

Recordings of passes are made of them: the cpu backend's (`cpu/tape.py`) and those that stand in for CUDA graphs where kernels are
emulated (`cuda/graphs.py`). Views need nothing, they are addresses already; any other operation is called again with the same
tensors, and its result copied to where it lay.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["FRESH", "NotRecordableError", "OtherPathError", "TorchCall", "Watch", "is_view", "tensors_in"]


class NotRecordableError(Exception):
    """The pass reads a tensor into Python."""


class OtherPathError(Exception):
    """A recorded pass met a value that Python decides by, and it is not the one of the recording."""


class TorchCall:
    """An operation of torch that is called again as it was."""

    def __init__(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        # What works in place has left its result where the next one looks for it.
        self._results = () if function._schema.is_mutable else tensors_in(result)  # noqa: SLF001  # the only way to ask
        self._shapes = [value.shape for value in self._results]
        self._said = result if isinstance(result, (bool, int, float)) else None

    def again(self) -> None:
        """Once more.

        Raises:
            OtherPathError: Python was told another value when the pass was recorded, and may have done something else with this.
        """
        result = self._function(*self._args, **self._kwargs)
        if self._said is not None and result != self._said:
            raise OtherPathError
        values = tensors_in(result)
        if [value.shape for value in values] != self._shapes and self._results:
            raise OtherPathError
        for to, value in zip(self._results, values, strict=False):
            to.copy_(value)


FRESH: Final = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.lift_fresh.default}
"""What makes memory and leaves it as it is."""


class Watch(TorchFunctionMode):
    """Sees what a dispatch mode does not: tensors that become Python's without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function of its Python interface."""
        if func in _READS:
            raise NotRecordableError(f"{func.__name__} hands a tensor to Python")
        return func(*args, **(kwargs or {}))


_READS: Final = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}


def is_view(function: Any, given: tuple[torch.Tensor, ...], result: tuple[torch.Tensor, ...]) -> bool:
    """Whether results lie in their inputs' memory and nothing is written. By address: `to` is said to alias also if it copies."""
    if function._schema.is_mutable or not result:  # noqa: SLF001  # the only way to ask
        return False
    # Weights that oneDNN has laid out have no storage.
    memory = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.layout is torch.strided}
    return all(tensor.untyped_storage().data_ptr() in memory for tensor in result)


def tensors_in(value: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(tensor for item in value for tensor in tensors_in(item))
    return ()

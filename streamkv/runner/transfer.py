"""Arrays on their way to the model's device, and results on their way back, without anybody waiting for the device.

A copy between a GPU and pinned memory is queued like a computation; torch keeps the pinned memory until it has ended. On the
processor nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HostCopy", "packed", "upload"]

_UNIT: Final = 16  # bytes; kernels read vectors of this size


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of any dtypes and shapes as tensors on the device, in one copy. They must not be changed any more."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    whole, parts = packed(arrays)
    whole = whole.pin_memory().to(device, non_blocking=True)
    return [whole[begin:end].view(dtype).view(shape) for begin, end, dtype, shape in parts]


def packed(arrays: Sequence[npt.NDArray[Any]]) -> tuple[torch.Tensor, list[tuple[int, int, torch.dtype, tuple[int, ...]]]]:
    """Contiguous arrays as one tensor of bytes, each at a multiple of 16; of each where it begins and ends, dtype and shape."""
    begins = np.cumsum([0, *(-(-array.nbytes // _UNIT) * _UNIT for array in arrays)]).tolist()
    whole = np.empty(begins[-1], np.uint8)
    parts = []
    for array, begin in zip(arrays, begins[:-1], strict=True):
        whole[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        parts.append((begin, begin + array.nbytes, torch.from_numpy(array).dtype, array.shape))
    return torch.from_numpy(whole), parts


class HostCopy:
    """Tensors of the device as they are now, to be read on the host later."""

    __slots__ = ("_event", "_tensors")

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Begin to copy."""
        self._event: Any = None
        self._tensors = tensors
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = tuple(
                torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) for one in tensors
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The copies, once they are there.

        Raises:
            RuntimeError: what was queued before them has failed on the device.
        """
        if self._event is not None:
            self._event.synchronize()
        return self._tensors

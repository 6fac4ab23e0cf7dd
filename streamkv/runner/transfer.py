"""Arrays on their way to the model's device, and results on their way back, without anybody waiting for the device.

A copy between a GPU and pinned memory is queued like a computation; torch keeps the pinned memory until it has ended. On the
processor nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HostCopy", "upload"]


def upload(arrays: Sequence[npt.NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """One-dimensional arrays as tensors on the device, in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    whole = torch.from_numpy(np.concatenate(arrays)).pin_memory().to(device, non_blocking=True)
    return list(torch.split(whole, [len(array) for array in arrays]))


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

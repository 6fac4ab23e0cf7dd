"""What the host makes anew for every step, on the device at addresses that stay: CUDA graphs have recorded them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Room", "upload"]


def upload(target: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copy from the host in stream order. Nobody waits, and `numbers` may be overwritten at once unless they are pinned.

    A GPU copies from pinned memory, which torch lends for the copy and does not lend again before it is done.
    """
    if target.is_cuda and numbers.numel():
        numbers = numbers.pin_memory()
    target.copy_(numbers, non_blocking=True)


class Room:
    """A tensor that is large enough. It grows by being made anew, twice as large: then its address is another one.

    Attributes:
        tensor: all of it.
        filled: the first entries, those that were uploaded last. A table's rows are as long as there is room: what follows
            behind the uploaded columns is arbitrary.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, place: torch.device | str) -> None:
        """Allocate, zeroed."""
        self.tensor = torch.zeros(tuple(shape), dtype=dtype, device=place)
        self.filled = self.tensor[:0]

    def reserve(self, *shape: int) -> bool:
        """Whether it had to grow, which loses what it held."""
        pairs = list(zip(self.tensor.shape, shape, strict=True))
        if all(need <= has for has, need in pairs):
            return False
        self.tensor = self.tensor.new_zeros([has if need <= has else max(need, 2 * has) for has, need in pairs])
        return True

    def load(self, numbers: torch.Tensor) -> bool:
        """Upload numbers, with as many dimensions as there is room for; whether it had to grow."""
        grew = self.reserve(*numbers.shape)
        upload(self.tensor[tuple(slice(size) for size in numbers.shape)], numbers)
        self.filled = self.tensor[: len(numbers)]
        return grew

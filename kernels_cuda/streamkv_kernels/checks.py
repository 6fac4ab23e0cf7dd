"""What wrappers of kernels ask of tensors before they launch: a kernel takes addresses and strides at their word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch

__all__ = ["TYPES", "aligned", "check", "positive_multiple"]

TYPES: Final = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "i8",
}
"""How the kernels call torch's dtypes."""

_VECTOR: Final = 16


def check(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None],
    layout: Literal["contiguous", "dense", "any"] = "contiguous",
) -> None:
    """See that an argument is what a kernel reads.

    Args:
        name: of the argument, for the message.
        shape: None = any size.
        layout: dense = the last dimension is.

    Raises:
        ValueError: it is not; the sentence names it.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        names = " or ".join(_short(dtype) for dtype in allowed)
        raise ValueError(f"{name} is {_short(tensor.dtype)}, and must be {names}")
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    if tensor.dim() != len(shape) or any(size not in (None, own) for size, own in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, and must have [{wanted}]")
    if layout == "contiguous" and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {list(tensor.stride())}")
    if layout == "dense" and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be dense; its strides are {list(tensor.stride())}")


def aligned(tensor: torch.Tensor, unit: int = _VECTOR) -> bool:
    """Whether the last dimension is dense, and all rows along it begin at multiples of `unit` bytes."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    dense = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    return dense and tensor.data_ptr() % unit == 0 and all(stride * tensor.itemsize % unit == 0 for stride in strides)


def positive_multiple(name: str, value: int, of: int) -> None:
    """See that a size is one.

    Raises:
        ValueError: it is not.
    """
    if value <= 0 or value % of:
        raise ValueError(f"{name} is {value}, and must be a multiple of {of}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

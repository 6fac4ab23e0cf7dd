"""Host side of norm.cu, activation.cu and rotate.cu: what lies between attention and linear layers."""

from __future__ import annotations

import math
from typing import Final

import torch

from streamkv_kernels.checks import TYPES, aligned, check, positive_multiple
from streamkv_kernels.device import Device, Kernel, Variant

__all__ = ["RowKernels"]

_LANES: Final = 8
"""Numbers of 16 bits in a vector."""

_SMALL: Final = 1024
"""Numbers of a row that one warp norms alone."""

_THREADS: Final = 256
_WARPS: Final = 4
_ACTIVATIONS: Final = {"silu": 0, "gelu_tanh": 1}


class RowKernels:
    """The kernels for one dtype. Tensors may have any strides; what the kernels cannot read is copied. Results are contiguous."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        """Nothing is compiled yet.

        Raises:
            ValueError: `dtype` is neither bfloat16 nor float16.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}, and must be bfloat16 or float16")
        self._device, self._dtype = device, dtype
        self._kernels: dict[Variant, Kernel] = {}

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float,
        round_first: bool,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Give x / sqrt(mean(x²) + eps) · (weight + offset) over the last dimension, a multiple of 8.

        Args:
            round_first: the quotient is rounded before it is multiplied (Llama), else only the product (Gemma).
            residual: like x, rows dense and at multiples of 16 bytes: x is added to it in place, and the sum is normed.

        Raises:
            ValueError: an argument does not fit.
        """
        width = x.shape[-1]
        check("x", x, self._dtype, x.shape, "any")
        check("weight", weight, self._dtype, [width])
        positive_multiple("the last dimension of x", width, _LANES)
        if residual is not None:
            check("residual", residual, self._dtype, x.shape)
            if not aligned(residual):
                raise ValueError("residual must begin at a multiple of 16 bytes")
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not x.numel():
            return out
        x, outer, inner, size = _two_levels(x)
        threads = 32 if width <= _SMALL else _THREADS
        block = threads if threads > 32 else 32 * _WARPS
        rows = x.numel() // width
        kernel = self._kernel("norm", "rms_norm", ("ROW_THREADS", threads), shared_bytes=4 * block // 32)
        kernel.launch(
            (-(-rows // (block // threads)), 1, 1), (block, 1, 1),
            x, outer, inner, size, rows, width, residual, width, weight, eps, offset, int(round_first), out,
        )  # fmt: skip  # in the order of the kernel's parameters
        return out

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """[..., 2 · width] -> [..., width], a multiple of 8: act(first half) · second half.

        Args:
            activation: silu or gelu_tanh.

        Raises:
            ValueError: an argument does not fit.
        """
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, and must be one of {', '.join(_ACTIVATIONS)}")
        check("x", x, self._dtype, x.shape, "any")
        positive_multiple("the last dimension of x", x.shape[-1], 2 * _LANES)
        width = x.shape[-1] // 2
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        if x.numel():
            rows = _aligned(x.reshape(-1, 2 * width))
            pieces = -(-width // (_THREADS * _LANES))
            kernel = self._kernel("activation", "gate", ("GELU", _ACTIVATIONS[activation]))
            kernel.launch((len(rows), pieces, 1), (_THREADS, 1, 1), rows, rows.stride(0), width, out)
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of [1, heads, num_tokens, head_dim], halves of a head, rounded as transformers rounds.

        Args:
            cos, sin: [1, num_tokens, head_dim], a multiple of 32.

        Returns:
            Like the arguments; the heads of a token lie side by side.

        Raises:
            ValueError: an argument does not fit.
        """
        _, _, num_tokens, head_dim = query.shape
        positive_multiple("head_dim", head_dim, 4 * _LANES)
        check("query", query, self._dtype, [1, None, num_tokens, head_dim], "any")
        check("key", key, self._dtype, [1, None, num_tokens, head_dim], "any")
        cos, sin = _aligned(cos.contiguous()), _aligned(sin.contiguous())
        check("cos", cos, self._dtype, [1, num_tokens, head_dim])
        check("sin", sin, self._dtype, [1, num_tokens, head_dim])
        return self._rotated(query, cos, sin), self._rotated(key, cos, sin)

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        _, heads, num_tokens, head_dim = x.shape
        out = torch.empty((1, num_tokens, heads, head_dim), dtype=x.dtype, device=x.device)
        if x.numel():
            x = _aligned(x)
            kernel = self._kernel("rotate", "rotate", ("HEAD_DIM", head_dim))
            grid = (num_tokens, -(-heads // _WARPS), 1)
            kernel.launch(grid, (32 * _WARPS, 1, 1), x, x.stride(2), x.stride(1), cos, sin, heads, out)
        return out.transpose(1, 2)

    def _kernel(self, source: str, name: str, define: tuple[str, int], shared_bytes: int = 0) -> Kernel:
        variant = Variant(source, (("IO", TYPES[self._dtype]), define))
        if variant not in self._kernels:
            self._kernels[variant] = self._device.kernel(variant, name, shared_bytes)
        return self._kernels[variant]


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """As it is, or a copy that vectors can be read from."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _two_levels(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """(x, outer stride, inner stride, inner count): its rows as two nested loops; a copy where they are not."""
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if aligned(x) and len(dims) <= 2:
        (inner, inner_stride), (_, outer_stride) = ([*reversed(dims), (1, 0), (1, 0)])[:2]
        return x, outer_stride, inner_stride, inner
    x = x.clone(memory_format=torch.contiguous_format)
    return x, 0, x.shape[-1], math.prod(x.shape[:-1])

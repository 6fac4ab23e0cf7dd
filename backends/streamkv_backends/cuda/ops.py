"""The cuda backend's fused functions: `streamkv.fused.FusedOps` by kernels. Linear layers are torch's."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from streamkv.errors import ConfigError
from streamkv.fused import Activation, Quantization
from streamkv_backends.cuda.sampling import CudaSampling
from streamkv_kernels.device import Device
from streamkv_kernels.rows import RowKernels

__all__ = ["DTYPES", "CudaOps"]

DTYPES: Final = frozenset({torch.bfloat16, torch.float16})


class CudaOps:
    """See the module's docstring."""

    def __init__(self, device: Device, dtype: torch.dtype, *, threads: int = 1024) -> None:
        """Nothing is compiled yet.

        Args:
            threads: of a block that samples.
        """
        self.dtype = dtype
        self._device, self._threads = device, threads
        self._rows = RowKernels(device, dtype)
        self.sampling = CudaSampling(device, threads=threads)

    def of(self, dtype: torch.dtype) -> CudaOps | None:
        """In each of the two short types."""
        if dtype is self.dtype:
            return self
        return CudaOps(self._device, dtype, threads=self._threads) if dtype in DTYPES else None

    def linear(self, linear: nn.Linear, quantization: Quantization | None) -> nn.Module | None:
        """The layer itself: torch's product is the best there is, and saying so lets the runner merge layers of equal input.

        Raises:
            ConfigError: the weights are to be quantised.
        """
        if quantization is not None:
            raise ConfigError(f"quantization {quantization} needs the cpu backend", param="quantization")
        return linear if linear.weight.dtype is self.dtype else None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float, round_first: bool) -> torch.Tensor:
        """Normed rows of the last dimension."""
        return self._rows.rms_norm(x, weight, eps, offset=offset, round_first=round_first)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """[..., 2 · width] -> [..., width]: act(first half) · second half."""
        return self._rows.gate(x, activation)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate [1, heads, tokens, dim]; cos and sin are [1, tokens, dim]."""
        return self._rows.rotate(query, key, cos, sin)

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, vocab_size] -> the first of each row's largest logits; whether all of a row are finite."""
        return self.sampling.most_probable(logits)

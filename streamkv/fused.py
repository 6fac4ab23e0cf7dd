"""What a backend may offer beside attention: fused functions in place of torch's modules. `AttentionBackend.ops`, or None there.

The runner's rewriter (`streamkv.runner.rewrite`) puts them into a model; all take and give tensors of `dtype` on the backend's
device, any strides, and give contiguous ones.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import nn

__all__ = ["Activation", "FusedOps", "Quantization"]

Activation = Literal["silu", "gelu_tanh"]
Quantization = Literal["int8", "int4"]


class FusedOps(Protocol):
    """See the module's docstring."""

    dtype: torch.dtype
    """The only one that they compute in."""

    def linear(self, linear: nn.Linear, quantization: Quantization | None) -> nn.Module | None:
        """The layer with its weight laid out for the backend, [..., in] -> [..., out]; None if torch's own is better.

        Args:
            quantization: how the weight is rounded; None = not at all.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float, round_first: bool) -> torch.Tensor:
        """Give x / sqrt(mean(x²) + eps) · (weight + offset) over the last dimension, a multiple of 16 (arXiv 1910.07467).

        Args:
            round_first: the quotient is rounded to `dtype` before it is multiplied (Llama), else only the product (Gemma).
        """

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """[..., 2 · width] -> [..., width], a multiple of 16: act(first half) · second half."""

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of [1, heads, num_tokens, head_dim], halves of a head; cos, sin [1, num_tokens, head_dim].

        head_dim is a multiple of 32 (arXiv 2104.09864).
        """

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, vocab_size] -> the first of each row's largest logits, [n] int64; whether all of a row are finite, [n] bool."""

"""What a backend may offer beside attention: fused functions in place of torch's modules. `AttentionBackend.ops`, or None there.

The runner's rewriter (`streamkv.runner.rewrite`) puts them into a model; all take and give tensors of `dtype` on the backend's
device, any strides, and give contiguous ones.

An object of these may also have `sampling`, functions that sample (`SamplingOps`); without them the runner samples by torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

__all__ = ["Activation", "FusedOps", "LogitChanges", "Quantization", "SamplingOps"]

Activation = Literal["silu", "gelu_tanh"]
Quantization = Literal["int8", "int4"]

_Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FusedOps(Protocol):
    """See the module's docstring."""

    dtype: torch.dtype
    """The only one that they compute in."""

    def of(self, dtype: torch.dtype) -> FusedOps | None:
        """Those that compute in `dtype`; None = there are none."""

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


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What is done to logits, in this order. Tensors lie on the backend's device; None = nothing.

    Lists are joined: row i has the entries starts[i] : starts[i + 1], starts being int64 [rows + 1], ids int32. What is too
    large for an id of the model is nowhere.

    Attributes:
        penalties: float32 [rows, 3], repetition, presence and frequency penalty; any numbers for rows that have seen nothing.
        seen: starts, ids and int32 counts in the output of the tokens that penalties look at; a row has no token twice.
        bias: starts, ids and float32 values; a row has no token twice.
        allowed: int32 [rows, at least ceil(vocab_size / 32)], bit t % 32 of word t / 32: whether token t may be.
        banned: starts and ids of what may not be sampled; a token may come twice.
    """

    penalties: torch.Tensor | None = None
    seen: _Lists | None = None
    bias: _Lists | None = None
    allowed: torch.Tensor | None = None
    banned: tuple[torch.Tensor, torch.Tensor] | None = None


class SamplingOps(Protocol):
    """Sampling without waiting: for equal logits the tokens of torch's way (`streamkv.runner.sampler`), without typical-p.

    `logits` are [rows, vocab_size], of any float dtype and strides, and are not changed.
    """

    def change(self, logits: torch.Tensor, changes: LogitChanges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[rows, vocab_size] float32, a changed copy; of the logits before, the most probable token and whether all are finite.

        The last two are [rows], int64 and bool.
        """

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        log_min_p: torch.Tensor,
        seed: torch.Tensor,
        branch: torch.Tensor,
        position: torch.Tensor,
        fallback: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token per row, [rows] int64; an arbitrary one for rows with NaN or +inf. All arguments are [rows].

        Args:
            temperature: float32; 0 = the most probable token.
            top_k: int64; 0 = all.
            top_p: float64; 1 = all.
            log_min_p: float64, the logarithm of min-p; -inf = all.
            seed, branch, position: int64; they pick the random number, see `streamkv.runner.philox`.
            fallback: int64, tokens for rows whose logits are all -inf.
        """

    def token_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one token a row, int64, its log-probability, [rows] float32, and its rank, int64: 1 + how many logits are larger."""

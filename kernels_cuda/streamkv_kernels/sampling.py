"""Host side of logits.cu and sample.cu: from logits to tokens. What the numbers mean stands in those files.

    plain greedy     most_probable(logits)
    all the rest     changed = change(logits, changes) where a row has penalties, bias or masks
                     sample(changed.logits, parameters, position, changed.best), or sample(logits, parameters, position)

Equal to `streamkv.runner.sampler` in what it computes, typical-p left out: rows with it stay with torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from streamkv_kernels.checks import TYPES, check
from streamkv_kernels.device import Argument, Device, Kernel, Variant

__all__ = ["Changed", "Changes", "Parameters", "SamplingKernels"]

_LOGITS: Final = (torch.float32, torch.bfloat16, torch.float16)
_MAX_VOCAB: Final = 2**19
"""Weights of more tokens could overflow 63 bits (logits.cuh)."""

_SCRATCH_BYTES: Final = 32 * 8
_SAMPLE_BYTES: Final = 4096 * 8 + 2 * 32 * 8 + 2 * 8
"""`Shared` in sample.cu."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How rows are sampled, [rows] each.

    Attributes:
        temperature: float32; 0 = the most probable token.
        top_k: int64; 0 = all.
        top_p: float64; 1 = all.
        log_min_p: float64, the logarithm of min-p; -inf = all.
        seed, branch: int64.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    seed: torch.Tensor
    branch: torch.Tensor


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to logits.

    Lists are joined: row i has the entries starts[i] : starts[i + 1], starts being int64 [rows + 1], ids int32.

    Attributes:
        penalties: float32 [rows, 3], repetition, presence and frequency; of rows without (1, 0, 0).
        seen: starts, ids and int32 counts in the output of the tokens that penalties look at; a row has no token twice.
        bias: starts, ids and float32 values; a row has no token twice.
        banned: starts and ids of what may not be sampled.
        allowed: int32 [rows, at least ceil(vocab_size / 32)], bit t % 32 of word t / 32: whether token t may be.
    """

    penalties: torch.Tensor | None = None
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    banned: tuple[torch.Tensor, torch.Tensor] | None = None
    allowed: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """Logits after `change`.

    Attributes:
        logits: float32 [rows, vocab_size], each row at a multiple of 16 bytes.
        best: int64 [rows], the most probable token before: what a row says that may say nothing.
        finite: bool [rows], whether all logits were, before.
    """

    logits: torch.Tensor
    best: torch.Tensor
    finite: torch.Tensor


class SamplingKernels:
    """The kernels for logits of any dtype."""

    def __init__(self, device: Device, *, threads: int = 1024) -> None:
        """Nothing is compiled yet.

        Args:
            threads: of a block, which has one row.
        """
        self._device, self._threads = device, threads
        self._kernels: dict[tuple[str, torch.dtype], Kernel] = {}

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, vocab_size] -> the first of each row's largest logits, int64; whether all of a row are finite, bool.

        Raises:
            ValueError: `logits` do not fit.
        """
        rows, vocab_size = self._check(logits)
        tokens, finite = _empty(logits, rows, torch.int64), _empty(logits, rows, torch.bool)
        self._launch("logits", "most_probable", logits, logits.stride(0), vocab_size, tokens, finite)
        return tokens, finite

    def change(self, logits: torch.Tensor, changes: Changes) -> Changed:
        """Apply penalties, bias and masks to a copy in float32.

        Raises:
            ValueError: an argument does not fit.
        """
        rows, vocab_size = self._check(logits)
        stride = -(-vocab_size // 4) * 4
        out = torch.empty((rows, stride), dtype=torch.float32, device=logits.device)
        changed = Changed(out[:, :vocab_size], _empty(logits, rows, torch.int64), _empty(logits, rows, torch.bool))
        self._launch(
            "logits", "change_logits", logits, logits.stride(0), vocab_size, changed.logits, stride,
            *_arguments(changes, rows, vocab_size), changed.best, changed.finite,
        )  # fmt: skip  # in the order of the kernel's parameters
        return changed

    def sample(
        self, logits: torch.Tensor, parameters: Parameters, position: torch.Tensor, fallback: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One token per row, int64, always one of the vocabulary; a row with NaN or Inf gives an arbitrary one.

        Args:
            position: [rows] int64, of the sampled tokens in their sequences.
            fallback: [rows] int64, tokens for rows whose logits are all -inf.

        Raises:
            ValueError: an argument does not fit.
        """
        rows, vocab_size = self._check(logits)
        own = parameters
        wide, real = torch.int64, torch.float64
        check("temperature", own.temperature, torch.float32, [rows])
        for name, tensor, dtype in (
            ("top_k", own.top_k, wide),
            ("top_p", own.top_p, real),
            ("log_min_p", own.log_min_p, real),
            ("seed", own.seed, wide),
            ("branch", own.branch, wide),
            ("position", position, wide),
        ):
            check(name, tensor, dtype, [rows])
        if fallback is not None:
            check("fallback", fallback, wide, [rows])
        tokens = _empty(logits, rows, wide)
        self._launch(
            "sample", "sample", logits, logits.stride(0), vocab_size, own.temperature, own.top_k, own.top_p, own.log_min_p,
            own.seed, own.branch, position, fallback, tokens,
        )  # fmt: skip  # in the order of the kernel's parameters
        return tokens

    def token_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one token a row its log-probability, float32, and its rank, int64: 1 + how many logits are larger.

        Args:
            tokens: [rows] int64, each below vocab_size.

        Raises:
            ValueError: an argument does not fit.
        """
        rows, vocab_size = self._check(logits)
        check("tokens", tokens, torch.int64, [rows])
        logprobs, ranks = _empty(logits, rows, torch.float32), _empty(logits, rows, torch.int64)
        self._launch("logits", "token_logprobs", logits, logits.stride(0), vocab_size, tokens, logprobs, ranks)
        return logprobs, ranks

    def _check(self, logits: torch.Tensor) -> tuple[int, int]:
        check("logits", logits, _LOGITS, [None, None], "dense")
        rows, vocab_size = logits.shape
        if not 0 < vocab_size <= _MAX_VOCAB:
            raise ValueError(f"logits have {vocab_size} tokens, and must have 1 to {_MAX_VOCAB}")
        return rows, vocab_size

    def _launch(self, source: str, name: str, logits: torch.Tensor, *arguments: Argument) -> None:
        if not len(logits):
            return
        key = (name, logits.dtype)
        if key not in self._kernels:
            shared_bytes = _SAMPLE_BYTES if source == "sample" else _SCRATCH_BYTES
            variant = Variant(source, (("LOGIT", TYPES[logits.dtype]),))
            self._kernels[key] = self._device.kernel(variant, name, shared_bytes)
        self._kernels[key].launch((len(logits), 1, 1), (self._threads, 1, 1), logits, *arguments)


def _empty(like: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, dtype=dtype, device=like.device)


def _arguments(changes: Changes, rows: int, vocab_size: int) -> tuple[Argument, ...]:
    """What the kernel takes from `penalties` to `allowed_stride`."""
    if changes.penalties is not None:
        check("penalties", changes.penalties, torch.float32, [rows, 3])
    elif changes.seen is not None:
        raise ValueError("penalties must be given with seen")
    seen = _joined("seen", changes.seen, rows, torch.int32)
    bias = _joined("bias", changes.bias, rows, torch.float32)
    banned = _joined("banned", changes.banned, rows, None)
    allowed: tuple[Argument, ...] = (None, 0)
    if changes.allowed is not None:
        check("allowed", changes.allowed, torch.int32, [rows, None], "dense")
        if changes.allowed.shape[1] * 32 < vocab_size:
            raise ValueError(f"allowed has {changes.allowed.shape[1]} words a row, too few for {vocab_size} tokens")
        allowed = (changes.allowed, changes.allowed.stride(0))
    return (changes.penalties, *seen, *bias, *banned, *allowed)


def _joined(name: str, parts: tuple[torch.Tensor, ...] | None, rows: int, numbers: torch.dtype | None) -> tuple[Argument, ...]:
    """Starts, ids and, if they have a dtype, numbers of a list."""
    if parts is None:
        return (None,) * (2 if numbers is None else 3)
    check(f"starts of {name}", parts[0], torch.int64, [rows + 1])
    check(f"ids of {name}", parts[1], torch.int32, [None])
    if numbers is not None:
        check(f"numbers of {name}", parts[2], numbers, parts[1].shape)
    return parts

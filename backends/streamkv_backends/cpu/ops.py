"""The backend's fused functions in bfloat16: `streamkv.fused.FusedOps` on processors.

While a tape is being recorded, results come from its arena and every call is written down (`tape.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import Any, Final

import torch
from torch import nn

from streamkv.fused import Quantization
from streamkv_backends.cpu.linear import NativeLinear
from streamkv_backends.cpu.native import Argmax, Gate, Linear, Norm, Rotate
from streamkv_backends.cpu.tape import Recorded, Tape
from streamkv_backends.taped import NotRecordableError, Watch

__all__ = ["CpuOps"]

_GATES: Final = {"silu": 0, "gelu_tanh": 1}
_LANES: Final = 16


class CpuOps:
    """See the module's docstring."""

    dtype = torch.bfloat16

    def __init__(self, native: Any) -> None:
        self._native = native
        self._tape: Tape | None = None
        self.pool = 0
        """How many pools the backend has allocated; recordings hold addresses of the one of their time."""

    def of(self, dtype: torch.dtype) -> CpuOps | None:
        """There are no others."""
        return self if dtype is self.dtype else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor for a result."""
        return torch.empty(shape, dtype=dtype) if self._tape is None else self._tape.arena.empty(shape, dtype)

    def note(self, kind: str, call: Any) -> None:
        """Write a call down, if something is being recorded."""
        if self._tape is not None:
            self._tape.native(kind, call)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float, round_first: bool) -> torch.Tensor:
        """Normed rows of the last dimension, contiguous; None of the widths that are no multiple of 16 come here."""
        width = x.shape[-1]
        x, outer, outer_stride, inner, inner_stride = _two_levels(x)
        out = self.empty(tuple(x.shape), x.dtype)
        call = Norm(
            x.data_ptr(), outer_stride, inner_stride, outer, inner, width, round_first,
            weight.data_ptr(), eps, offset, out.data_ptr(),
        )  # fmt: skip  # in the order of the struct
        self._native.skv_norm(byref(call))
        self.note("norm", call)
        return out

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """[..., 2 * width] -> [..., width]: act(first half) * second half."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = self.empty((*x.shape[:-1], width), x.dtype)
        call = Gate(x.data_ptr(), out.numel() // width, width, _GATES[activation], out.data_ptr())
        self._native.skv_gate(byref(call))
        self.note("gate", call)
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate [1, heads, tokens, dim]; cos and sin are [1, tokens, dim]. Results have the heads of a token side by side."""
        query, key, cos, sin = _dense(query), _dense(key), cos.contiguous(), sin.contiguous()
        _, query_heads, tokens, dim = query.shape
        key_heads = key.shape[1]
        queries = self.empty((1, tokens, query_heads, dim), query.dtype)
        keys = self.empty((1, tokens, key_heads, dim), key.dtype)
        call = Rotate(
            query.data_ptr(), key.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            query.stride(2), query.stride(1), key.stride(2), key.stride(1),
            tokens, query_heads, key_heads, dim, queries.data_ptr(), keys.data_ptr(),
        )  # fmt: skip  # in the order of the struct
        self._native.skv_rotate(byref(call))
        self.note("rotate", call)
        return queries.transpose(1, 2), keys.transpose(1, 2)

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] int64, the first of each row's largest logits; [n] bool, whether all of the row are finite. [n, vocab_size] in."""
        logits = _dense(logits)
        index = torch.empty(len(logits), dtype=torch.int64)
        finite = torch.empty(len(logits), dtype=torch.bool)
        call = Argmax(logits.data_ptr(), logits.stride(0), *logits.shape, index.data_ptr(), finite.data_ptr())
        self._native.skv_argmax(byref(call))
        return index, finite

    def linear(self, linear: nn.Linear, quantization: Quantization | None) -> nn.Module | None:
        """The same layer with its weight laid out for the kernels."""
        return NativeLinear(linear, self, quantization) if linear.weight.dtype is self.dtype else None

    def run_linear(self, call: Linear) -> None:
        """Carry out a product; its scratch comes from where results do."""
        scratch = self.empty((self._native.skv_linear_scratch(call.weight, call.m),), torch.uint8)
        call.scratch = scratch.data_ptr()
        self._native.skv_linear_call(byref(call))
        self.note("linear", call)

    def record(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, Recorded | None]:
        """Run `function(*inputs)`; returns its result, and the recording for `CpuBackend.replay` if it can be run again."""
        mine = tuple(value.clone() for value in inputs)
        tape, threads = Tape(), self._native.skv_threads()
        self._tape = tape
        try:
            with Watch(), tape:
                output = function(*mine)
        except NotRecordableError:
            self._tape = None
            return function(*inputs), None
        finally:
            self._tape = None
        return output, Recorded(self._native, mine, output, tape, threads, self.pool)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _two_levels(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """(x, outer count, outer stride, inner count, inner stride): its rows as two nested loops; a copy if they are not."""
    if x.is_contiguous():
        width = x.shape[-1]
        return x, x.numel() // width, width, 1, width
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and len(dims) <= 2:
        (inner, inner_stride), (outer, outer_stride) = ([*reversed(dims), (1, 0), (1, 0)])[:2]
        return x, outer, outer_stride, inner, inner_stride
    return _two_levels(x.contiguous())

"""Which variants of the kernels models need: found by building what launches them on a device that only writes down.

python -m streamkv_kernels.variants sm_90        # compiles them all into the package, for a wheel or an image
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch

from streamkv.errors import BackendError
from streamkv_kernels.attention import AttentionSpec, MergeStates
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention
from streamkv_kernels.blocks import BlockMover, Pieces
from streamkv_kernels.compile import ARCHITECTURES, prebuild
from streamkv_kernels.device import Argument, Grid, Variant
from streamkv_kernels.kv_write import Angles, KVWriter, LayerCache
from streamkv_kernels.rows import RowKernels
from streamkv_kernels.sampling import Changes, Parameters, SamplingKernels

__all__ = ["HEAD_DIMS", "Asked", "asked"]

HEAD_DIMS: Final = (64, 80, 96, 128, 256)
_DTYPES: Final = (torch.bfloat16, torch.float16)
_QUANTISED: Final = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True, slots=True)
class Asked:
    """A kernel, and how much dynamic shared memory a block of it gets."""

    variant: Variant
    name: str
    shared_bytes: int


@dataclass
class _Recorder:
    """A device that writes down what it is asked for."""

    name: str = "recorder"
    num_sms: int = 1
    kernels: dict[tuple[Variant, str], Asked] = field(default_factory=dict)

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> _Nothing:
        self.kernels.setdefault((variant, name), Asked(variant, name, shared_bytes))
        return _Nothing()


class _Nothing:
    """A kernel that is never launched."""

    def bind(self, *arguments: Argument) -> _Nothing:
        return self

    def launch(self, grid: Grid, block: Grid, *arguments: Argument) -> None:
        pass


def asked(dtypes: tuple[torch.dtype, ...] = _DTYPES, head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Asked]:
    """Every kernel in every variant that models of these dtypes and head dimensions run, caches of 8 bits included."""
    recorder = _Recorder()
    for dtype in dtypes:
        for head_dim in head_dims:
            for cache_dtype in (dtype, *_QUANTISED):
                spec = AttentionSpec(4, 2, head_dim, dtype, cache_dtype, scale=1.0)
                DecodeAttention(recorder, spec, 1)
                PrefillAttention(recorder, spec)
                _write(recorder, dtype, cache_dtype, head_dim)
            MergeStates(recorder, head_dim, torch.float32)
        _rows(recorder, dtype)
        _logits(recorder, dtype)
    _logits(recorder, torch.float32)
    BlockMover(recorder, torch.zeros(64, dtype=torch.uint8), Pieces(64, 1, 64, 64))
    yield from recorder.kernels.values()


def _write(recorder: _Recorder, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    blocks = torch.zeros((1, 1, 16, head_dim)).to(cache_dtype)
    scales = torch.zeros((1, 1, 16)) if cache_dtype in _QUANTISED else None
    rows = torch.zeros((1, 1, head_dim), dtype=dtype)
    writer, cache = KVWriter(recorder, dtype), LayerCache(blocks, blocks, scales, scales)
    slots = torch.zeros(1, dtype=torch.int64)
    writer.write(rows, rows, slots, cache)
    if cache_dtype is dtype and head_dim % 32 == 0:
        writer.rotate_and_write(rows, rows, rows, slots, cache, rope=Angles(rows[0], rows[0]))


def _rows(recorder: _Recorder, dtype: torch.dtype) -> None:
    kernels = RowKernels(recorder, dtype)
    for width in (256, 4096):
        x = torch.zeros((1, width), dtype=dtype)
        kernels.rms_norm(x, x[0], 1e-6, offset=0.0, round_first=True)
    for activation in ("silu", "gelu_tanh"):
        kernels.gate(x, activation)
    for head_dim in (64, 96, 128, 256):
        heads = torch.zeros((1, 1, 1, head_dim), dtype=dtype)
        kernels.rotate(heads, heads, heads[0], heads[0])


def _logits(recorder: _Recorder, dtype: torch.dtype) -> None:
    kernels = SamplingKernels(recorder)
    logits, wide = torch.zeros((1, 32), dtype=dtype), torch.zeros(1, dtype=torch.int64)
    real = torch.zeros(1, dtype=torch.float64)
    kernels.most_probable(logits)
    kernels.change(logits, Changes())
    kernels.sample(logits, Parameters(real.float(), wide, real, real, wide, wide), wide)
    kernels.token_logprobs(logits, wide)


if __name__ == "__main__":
    try:
        prebuild(dict.fromkeys(kernel.variant for kernel in asked()), sys.argv[1:] or ARCHITECTURES)
    except BackendError as error:
        sys.exit(str(error))

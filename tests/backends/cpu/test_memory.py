"""Steps of changing sizes for as long as one likes: recordings come and go, memory stays."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv.runner.recordings import Recordings
from streamkv_backends.cpu.backend import CpuBackend

LAYER = LayerSpec(2, 1, 32, 0.2)
WIDTH = 64
SIZES = [*range(1, 65), 96, 128, 160]  # more than recordings are kept
PERIOD = [*SIZES, *(random.Random(1).choices(range(1, 11), k=360))]
PERIODS = 5


class Allocated(ctypes.Structure):
    """What glibc's malloc tells of itself."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip  # in the order of the struct


def native_bytes() -> int:
    """In use, whoever asked for it: torch, the kernels, Python's large objects."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("this C library does not tell what is in use")
    mallinfo.restype = Allocated
    told = mallinfo()
    return int(told.uordblks + told.hblkhd)


class Model:
    """A layer of everything that recordings are made of: products, norm, gate, attention, operations of torch."""

    def __init__(self, backend: CpuBackend) -> None:
        self.backend, self.metadata = backend, None
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn((100, WIDTH), generator=generator).bfloat16()
        self.weight = torch.ones(WIDTH, dtype=torch.bfloat16)
        layers = [nn.Linear(WIDTH, size, dtype=torch.bfloat16).requires_grad_(False) for size in (128, 128)]
        self.projection, self.mlp = (backend.ops.linear(layer, None) for layer in layers)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        ops = self.backend.ops
        x = self.embedding[tokens[0]] + positions[0, :, None].bfloat16() * 0.01
        heads = self.projection(ops.rms_norm(x, self.weight, 1e-6, offset=0.0, round_first=True)).view(-1, 4, 32)
        attended = self.backend.attend(heads[:, :2], heads[:, 2:3], heads[:, 3:], 0, self.metadata)
        x = x + attended.view(-1, WIDTH)
        return (x + ops.gate(self.mlp(x), "silu"))[wanted].float().softmax(dim=-1)


def step(recordings: Recordings, model: Model, size: int, number: int) -> None:
    """`size` sequences decode their first or second token."""
    position = number % 2
    counted = torch.arange(size, dtype=torch.int32)
    model.metadata = model.backend.prepare(
        StepTensors(
            torch.arange(size + 1, dtype=torch.int32),
            torch.full((size,), position + 1, dtype=torch.int32),
            counted[:, None].contiguous(),
            counted.long() * 16 + position,
        )
    )
    inputs: Any = ((counted.long() + number)[None] % 100, torch.full((1, size), position), torch.arange(size))
    recordings.run(inputs, model.metadata)


@torch.inference_mode()
def test_two_thousand_steps_of_changing_sizes_leave_nothing_behind() -> None:
    backend = CpuBackend()
    backend.allocate_kv(KVSpec(max(SIZES), 16, torch.bfloat16, (LAYER,)))
    model = Model(backend)
    recordings = Recordings(backend, model)

    def period() -> tuple[int, int]:
        """(bytes of malloc, blocks of Python) after it; each ends with the same recordings."""
        for number, size in enumerate(PERIOD):
            step(recordings, model, size, number)
        gc.collect()
        return native_bytes(), sys.getallocatedblocks()

    for _ in range(5):
        before = period()
    sizes = recordings.sizes
    for _ in range(PERIODS):
        after = period()
    assert recordings.off is None
    assert recordings.sizes == sizes
    assert len(sizes) == 64
    grown = [now - then for now, then in zip(after, before, strict=True)]
    assert grown[0] < 100_000, "bytes of native memory"
    assert grown[1] < 400, "blocks of Python's memory"

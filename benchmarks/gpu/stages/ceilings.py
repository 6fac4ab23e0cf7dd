"""What the device can do at all: read, copy, multiply. Everything else is a share of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.machine import Call, Machine
from benchmarks.gpu.stage import Row
from streamkv_kernels.device import Bound, Variant

__all__ = ["ceilings"]

_THREADS = 512


def ceilings(machine: Machine) -> Iterator[Row]:
    """Reading in a row is the ceiling of decode, a big product that of prefill."""
    num_bytes = 2**20 if machine.tiny else 4 * 2**30
    memory = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=machine.place).normal_().view(torch.uint8)
    for kib, shuffled in ((1024, False), (64, False), (64, True), (4, True)):
        read, out = _reader(machine, memory, kib * 1024, shuffled)
        seconds = machine.seconds([read])
        assert _xor(out) == _xor(memory.view(torch.int32)), "not everything was read"
        rate = None if seconds is None else num_bytes / seconds
        if rate is not None:
            machine.ceilings["read"] = max(rate, machine.ceilings.get("read", 0.0))
        yield {"ceiling": f"read, {kib} KiB pieces {'shuffled' if shuffled else 'in a row'}", "GB/s": _giga(rate)}
    half = num_bytes // 2
    seconds = machine.seconds([lambda: memory[:half].copy_(memory[half:])])
    if seconds is not None:
        machine.ceilings["copy"] = num_bytes / seconds
    yield {"ceiling": "copy on the device, read and written", "GB/s": _giga(machine.ceilings.get("copy"))}
    size = 128 if machine.tiny else 8192
    for dtype in (torch.bfloat16, torch.float16):
        left, right = (torch.randn(size, size, device=machine.place).to(dtype) for _ in range(2))
        product: Call = partial(torch.mm, left, right)
        seconds = machine.seconds([product])
        rate = None if seconds is None else 2 * size**3 / seconds
        if rate is not None:
            machine.ceilings["matmul"] = max(rate, machine.ceilings.get("matmul", 0.0))
        yield {"ceiling": f"product {size}³, {dtype}", "TFLOP/s": None if rate is None else rate / 1e12}


def _reader(machine: Machine, memory: torch.Tensor, piece_bytes: int, shuffled: bool) -> tuple[Call, torch.Tensor]:
    pieces = len(memory) // piece_bytes
    order = torch.randperm(pieces) if shuffled else torch.arange(pieces)
    blocks = min(pieces, 4 * machine.kernels.num_sms)
    out = torch.empty(blocks * _THREADS, dtype=torch.int32, device=machine.place)
    kernel = machine.kernels.kernel(Variant("stream"), "read_pieces")
    bound: Bound = kernel.bind(memory, order.to(machine.place), out, pieces, piece_bytes)
    return partial(bound.launch, (blocks, 1, 1), (_THREADS, 1, 1)), out


def _xor(words: torch.Tensor) -> int:
    while len(words) > 1:
        half = len(words) // 2
        rest = words[2 * half :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return int(words[0])


def _giga(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9

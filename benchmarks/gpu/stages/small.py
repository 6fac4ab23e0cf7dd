"""The kernels around attention: as a share of what copying can be, and beside torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch.nn import functional

from benchmarks.gpu.machine import Call, Machine
from benchmarks.gpu.stage import Row
from streamkv_kernels.blocks import BlockMover, Pieces
from streamkv_kernels.kv_write import KVWriter, LayerCache
from streamkv_kernels.rows import RowKernels
from streamkv_kernels.sampling import Parameters, SamplingKernels

__all__ = ["rows", "sampling", "swap"]

BF16 = torch.bfloat16
_COPIES = 3  # of the inputs, taken in turn


def rows(machine: Machine) -> Iterator[Row]:
    """Norms, activation, rotary embedding, writing of keys and values."""
    width, wide, heads = (256, 512, (4, 2)) if machine.tiny else (4096, 14336, (32, 8))
    for tokens in (3,) if machine.tiny else (1, 64, 8192):
        for name, num_bytes, own, plain in _row_kernels(machine, tokens, width, wide, heads):
            seconds = machine.seconds(own)
            beside = machine.seconds(plain) if plain else None
            rate = None if seconds is None else num_bytes / seconds
            yield {
                "kernel": name,
                "tokens": tokens,
                "MB": num_bytes / 1e6,
                "µs": None if seconds is None else seconds * 1e6,
                "torch µs": None if beside is None else beside * 1e6,
                "of copying": machine.share(rate, "copy"),
            }


def _row_kernels(
    machine: Machine, tokens: int, width: int, wide: int, heads: tuple[int, int]
) -> Iterator[tuple[str, int, list[Call], list[Call]]]:
    """Name, bytes read and written, calls, and torch's for the same."""
    own, place, (many, few) = RowKernels(machine.kernels, BF16), machine.place, heads
    head_dim = 64 if machine.tiny else 128
    weight = torch.randn(width, device=place).to(BF16)
    x, residual, pair = (_some(machine, tokens, columns) for columns in (width, width, 2 * wide))
    norm = partial(own.rms_norm, weight=weight, eps=1e-6, offset=0.0, round_first=True)
    plain: list[Call] = [partial(functional.rms_norm, one, (width,), weight, 1e-6) for one in x]
    yield "RMS norm", 4 * tokens * width, [partial(norm, one) for one in x], plain
    added: list[Call] = [partial(norm, one, residual=other) for one, other in zip(x, residual, strict=True)]
    yield "add, RMS norm", 8 * tokens * width, added, []
    gated: list[Call] = [partial(own.gate, one, "silu") for one in pair]
    yield "SiLU · up", 6 * tokens * wide, gated, [partial(_plain_gate, one, wide) for one in pair]
    table = torch.rand(1, tokens, head_dim, device=place).to(BF16)
    qkv = [one.view(1, tokens, -1, head_dim).transpose(1, 2) for one in _some(machine, tokens, (many + 2 * few) * head_dim)]
    turned: list[Call] = [partial(own.rotate, one[:, :many], one[:, many : many + few], table, table) for one in qkv]
    yield "rotary embedding", 4 * tokens * (many + few) * head_dim, turned, []
    pool = torch.zeros(-(-tokens // 16), 2, few, 16, head_dim, dtype=BF16, device=place)
    cache, slots = LayerCache(pool[:, 0], pool[:, 1]), torch.randperm(tokens, device=place)
    write = partial(KVWriter(machine.kernels, BF16).write, slots=slots, cache=cache)
    new = [one[0].transpose(0, 1) for one in qkv]
    written: list[Call] = [partial(write, one[:, many : many + few], one[:, many + few :]) for one in new]
    yield "keys and values to their slots", 8 * tokens * few * head_dim, written, []


def _some(machine: Machine, tokens: int, columns: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, columns, device=machine.place).to(BF16) for _ in range(_COPIES)]


def _plain_gate(x: torch.Tensor, width: int) -> torch.Tensor:
    return functional.silu(x[:, :width]) * x[:, width:]


def sampling(machine: Machine) -> Iterator[Row]:
    """Temperature, top-k, top-p, min-p without sorting, beside torch's sort; and greedy beside argmax."""
    kernels = SamplingKernels(machine.kernels)
    for batch, vocab in ((2, 500),) if machine.tiny else product((1, 64, 256), (32_000, 128_256, 256_000)):
        logits = [(torch.randn(batch, vocab, device=machine.place) * 4).to(BF16) for _ in range(_COPIES)]
        position = torch.arange(batch, device=machine.place)
        for name, top_k, top_p in (("top-p 0.9", 0, 0.9), ("top-k 50, top-p 0.9", 50, 0.9), ("all", 0, 1.0)):
            parameters = _parameters(machine, batch, top_k, top_p)
            seconds = machine.seconds([partial(kernels.sample, one, parameters, position) for one in logits])
            plain = machine.seconds([partial(_plain_sample, one, top_p) for one in logits])
            yield _sampled(name, batch, vocab, seconds, plain)
        seconds = machine.seconds([partial(kernels.most_probable, one) for one in logits])
        yield _sampled("greedy", batch, vocab, seconds, machine.seconds([partial(torch.argmax, one, -1) for one in logits]))


def _parameters(machine: Machine, batch: int, top_k: int, top_p: float) -> Parameters:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=machine.place)

    wide, real = torch.int64, torch.float64
    return Parameters(
        temperature=full(0.8, torch.float32),
        top_k=full(top_k, wide),
        top_p=full(top_p, real),
        log_min_p=full(-torch.inf, real),
        seed=full(7, wide),
        branch=full(0, wide),
    )


def _plain_sample(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What a sampler in torch does: sort, cut, draw."""
    values, order = (logits.float() / 0.8).sort(dim=-1, descending=True)
    weights = values.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights > top_p, 0.0)
    drawn = (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
    return order.gather(-1, drawn)


def _sampled(name: str, batch: int, vocab: int, seconds: float | None, plain: float | None) -> Row:
    return {
        "what": name,
        "rows": batch,
        "vocabulary": vocab,
        "µs": None if seconds is None else seconds * 1e6,
        "torch µs": None if plain is None else plain * 1e6,
    }


def swap(machine: Machine) -> Iterator[Row]:
    """Blocks of 2 MiB between device and pinned host memory, one copy each or gathered first; and within the device."""
    size, count = (4096, 5) if machine.tiny else (2 * 2**20, 128)
    pool = torch.zeros(3 * count * size, dtype=torch.uint8, device=machine.place)
    host = torch.zeros(count, size, dtype=torch.uint8, pin_memory=machine.timed)
    blocks = [int(block) for block in torch.randperm(3 * count)[:count]]
    views = [pool[block * size : (block + 1) * size] for block in blocks]
    mover = BlockMover(machine.kernels, pool, Pieces(size, 1, size, size))
    others = [block for block in range(3 * count) if block not in set(blocks)][:count]

    def out_one_by_one() -> None:
        for view, row in zip(views, host, strict=True):
            row.copy_(view, non_blocking=True)

    def in_one_by_one() -> None:
        for view, row in zip(views, host, strict=True):
            view.copy_(row, non_blocking=True)

    ways: dict[str, Callable[[], object]] = {
        "to the host, a copy a block": out_one_by_one,
        "from the host, a copy a block": in_one_by_one,
        "to the host, gathered first": lambda: host.copy_(mover.gather(blocks), non_blocking=True),
        "from the host, scattered after": lambda: mover.scatter(blocks, host.to(machine.place, non_blocking=True)),
        "within the device": lambda: mover.copy(list(zip(blocks, others, strict=True))),
    }
    for name, way in ways.items():
        seconds = machine.seconds([way], graph=False)
        rate = None if seconds is None else size * count / seconds
        yield {"way": name, "blocks": count, "KiB a block": size // 1024, "GB/s": None if rate is None else rate / 1e9}

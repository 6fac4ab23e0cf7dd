"""The cases of the backend contract: literal tables, cut down to what a backend's `Limits` assert.

workload    what a pool lives through: chunks, decodes, sharing, moves, padding; one tuple a step
layers      attention facts: heads, head dim, window, soft-cap, sinks; two layers at least, so that a mix-up of layers shows
case        workload x layers x dtype x block size, with a name that says all of it

A kernel is compiled per dtype, head_dim and block size, so every combination of these is a case; the rest varies one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from streamkv.attention import KVSpec, LayerSpec, Limits

__all__ = ["DTYPES", "WORKLOADS", "Case", "Workload", "cases"]

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS: Final = (64, 80, 96, 128, 256)
BLOCK_SIZES: Final = (16, 8, 32)
# A backend that asserts "anything" is also asked for what no kernel is tuned for.
ODD_HEAD_DIMS: Final = (24, 72)
ODD_BLOCK_SIZES: Final = (1, 5)


@dataclass(frozen=True, slots=True)
class Workload:
    """What happens to a pool.

    Attributes:
        steps: per step the number of new tokens of each sequence; 0 = it is not in this step.
        forks: (step, parent, child): before the step the child becomes a copy of the parent; full blocks are shared, the
            last one is copied if it is only partly filled.
        moves: (step, sequence): before the step its blocks are read, poisoned, and written back under other ids (a swap).
        faulty: sequences whose q, k, v are NaN from the second step on, as after a numerical fault; theirs alone may suffer.
        padding_sequences: sequences of length 0 that each own one padding row.
        padding_rows: padding rows after the last sequence.
    """

    steps: tuple[tuple[int, ...], ...]
    forks: tuple[tuple[int, int, int], ...] = ()
    moves: tuple[tuple[int, int], ...] = ()
    faulty: tuple[int, ...] = ()
    padding_sequences: int = 0
    padding_rows: int = 0

    def lengths(self) -> list[int]:
        """Tokens of each sequence at the end."""
        lengths = [0] * len(self.steps[0])
        for index, counts in enumerate(self.steps):
            for _, parent, child in (fork for fork in self.forks if fork[0] == index):
                lengths[child] = lengths[parent]
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        return lengths


WORKLOADS: Final = {
    "one token": Workload(((1,), (1,), (1,))),
    "ragged prefill": Workload(((1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65),)),
    "decode": Workload(((1, 7, 8, 15, 16, 17, 31, 32, 40), (1,) * 9, (1,) * 9)),
    "chunks and decodes mixed": Workload(((6, 20, 1, 0), (1, 13, 1, 9), (1, 1, 1, 30), (7, 0, 16, 1), (1, 2, 0, 1))),
    "long context": Workload(((260, 3), (255, 1), (1, 1), (1, 0))),
    "shared blocks": Workload(((37, 0, 0, 4), (1, 1, 9, 0), (1, 3, 1, 1)), forks=((1, 0, 1), (1, 0, 2))),
    # Long enough for kernels that read a shared prefix once for all, or split one long sequence between threads.
    "long shared prefix": Workload(
        ((300, 0, 0, 0, 7), (1, 1, 1, 40, 1), (1, 1, 0, 1, 1), (1, 1, 1, 1, 1)), forks=((1, 0, 1), (1, 0, 2), (1, 0, 3))
    ),
    "one long sequence": Workload(((700,), (1,), (30,), (1,))),
    "read and written back": Workload(((35, 9, 16), (1, 0, 1), (1, 5, 1)), moves=((1, 0), (2, 1))),
    "beside a fault": Workload(((9, 5, 20), (1, 2, 1), (3, 1, 1)), faulty=(1,)),
    "padded": Workload(((5, 1, 18), (1, 1, 1), (1, 1, 1)), padding_sequences=2, padding_rows=3),
}
MIXED: Final = "chunks and decodes mixed"


@dataclass(frozen=True, slots=True)
class Case:
    """One life of a pool, and the arithmetic it is judged by."""

    name: str
    dtype: torch.dtype
    block_size: int
    layers: tuple[LayerSpec, ...]
    workload: Workload

    @property
    def spec(self) -> KVSpec:
        """What to allocate: room for everything, and some blocks that nobody ever uses."""
        used = sum(-(-length // self.block_size) for length in self.workload.lengths())
        spare = 6 + sum(-(-self.workload.lengths()[sequence] // self.block_size) for _, sequence in self.workload.moves)
        return KVSpec(used + spare, self.block_size, self.dtype, self.layers)


def cases(limits: Limits) -> tuple[Case, ...]:
    """All cases that `limits` assert, the plain ones first.

    Raises:
        AssertionError: `limits` assert none of the dtypes that are judged here.
    """
    if not limits.dtypes.intersection(DTYPES):
        raise AssertionError("limits name none of float32, bfloat16, float16, so there is nothing to test")
    found: dict[str, Case] = {}
    for case in _all(limits):
        if limits.refusal(case.spec) is None:
            found.setdefault(case.name, case)
    return tuple(found.values())


def _all(limits: Limits) -> Iterator[Case]:
    head_dims = _asserted(HEAD_DIMS, limits.head_dims, ODD_HEAD_DIMS)
    block_sizes = _asserted(BLOCK_SIZES, limits.block_sizes, ODD_BLOCK_SIZES)
    usual_dim, usual_size = head_dims[0], block_sizes[0]
    for dtype in DTYPES:
        for workload in WORKLOADS:
            yield _case(dtype, usual_size, workload, "plain", (_layer(usual_dim),) * 2)
        for name, layers in _layer_tables(usual_dim).items():
            yield _case(dtype, usual_size, MIXED, name, layers)
            yield _case(dtype, usual_size, "decode", name, layers)
            yield _case(dtype, usual_size, "long shared prefix", name, layers)
        for head_dim in head_dims:
            for block_size in block_sizes:
                yield _case(dtype, block_size, MIXED, "plain", (_layer(head_dim),) * 2)


def _layer_tables(head_dim: int) -> dict[str, tuple[LayerSpec, ...]]:
    layer = _layer(head_dim)
    windows = (1, 5, 16, 17, 4096)
    return {
        "MHA 4:4": (_layer(head_dim, 4, 4),) * 2,
        "GQA 6:2": (_layer(head_dim, 6, 2),) * 2,
        "GQA 16:2": (_layer(head_dim, 16, 2),) * 2,
        "MQA 8:1": (_layer(head_dim, 8, 1),) * 2,
        "one head": (_layer(head_dim, 1, 1),) * 2,
        **{f"window {window}": (replace(layer, window=window), layer) for window in windows},
        "soft-cap 2": (replace(layer, soft_cap=2.0), layer),
        "soft-cap 30, window 9": (replace(layer, soft_cap=30.0), replace(layer, soft_cap=30.0, window=9)),
        "sinks": (replace(layer, has_sinks=True), layer),
        "sinks, window 9": (replace(layer, has_sinks=True, window=9), replace(layer, has_sinks=True)),
        "sinks, soft-cap 2": (replace(layer, has_sinks=True, soft_cap=2.0),) * 2,
        "large scores": (replace(layer, scale=4.0),) * 2,
        "unlike layers": (_layer(head_dim, 4, 2), _layer(head_dim, 8, 1), replace(_layer(head_dim, 2, 2), window=7)),
    }


def _layer(head_dim: int, num_heads: int = 4, num_kv_heads: int = 2) -> LayerSpec:
    return LayerSpec(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5)


def _asserted(usual: tuple[int, ...], asserted: frozenset[int] | None, odd: tuple[int, ...]) -> tuple[int, ...]:
    """The usual values that are asserted, then whatever else is; never empty."""
    if asserted is None:
        return usual + odd
    return tuple(value for value in usual if value in asserted) + tuple(sorted(asserted.difference(usual)))


def _case(dtype: torch.dtype, block_size: int, workload: str, variant: str, layers: tuple[LayerSpec, ...]) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"{kind}, {workload}, {variant}, head_dim {layers[0].head_dim}, blocks of {block_size}"
    return Case(name, dtype, block_size, layers, WORKLOADS[workload])

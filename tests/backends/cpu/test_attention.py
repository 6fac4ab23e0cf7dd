"""A sequence's attention depends on its own tokens only, bit by bit: whatever the kernels share, split or batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv.errors import BackendError
from streamkv_backends.contract import cases, check, check_refusals
from streamkv_backends.cpu.backend import CpuBackend

SIZE = 16
LAYER = LayerSpec(4, 2, 64, 0.125)
VARIANTS = {
    "plain": LAYER,
    "window": LayerSpec(4, 2, 64, 0.125, window=150),
    "soft-cap": LayerSpec(4, 2, 64, 0.125, soft_cap=2.0),
    "MQA with more heads than rows": LayerSpec(40, 1, 32, 0.2),
    "sinks": LayerSpec(4, 2, 80, 0.1, has_sinks=True),
}
SLIM = ("head_dim 64, blocks of 16", "head_dim 80, blocks of 32", "head_dim 256, blocks of 128")

BACKEND = CpuBackend()


@pytest.mark.parametrize("case", cases(BACKEND.limits), ids=lambda case: case.name)
def test_it_keeps_the_contract(case: Any) -> None:
    check(BACKEND, case)


def test_it_refuses_what_its_limits_exclude() -> None:
    check_refusals(BACKEND)


def test_every_instruction_set_keeps_the_contract(native: Any) -> None:
    backend = CpuBackend(native=native)
    chosen = [case for case in cases(backend.limits) if case.name.endswith(SLIM)]
    assert len(chosen) > 60
    for case in chosen:
        check(backend, case)


def test_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="runs on the processor, not on cuda:1; leave --device at auto"):
        CpuBackend("cuda:1")


@dataclass
class Life:
    """Sequences with tokens of their own, driven through one backend in any batches; keeps what came out for each token."""

    backend: CpuBackend
    layer: LayerSpec
    dtype: torch.dtype
    tables: list[list[int]]

    def __post_init__(self) -> None:
        self.pool = self.backend.allocate_kv(KVSpec(400, SIZE, self.dtype, (self.layer,)))
        self.done = [0] * len(self.tables)
        self.out: list[list[torch.Tensor]] = [[] for _ in self.tables]
        self.sinks = torch.linspace(-1, 1, self.layer.num_heads) if self.layer.has_sinks else None
        self.kinds: dict[str, int] = {}

    def tokens(self, name: int, first: int, count: int) -> tuple[torch.Tensor, ...]:
        """q, k, v of tokens first.. of the sequence called `name`: always the same."""
        parts = []
        for kind, heads in enumerate((self.layer.num_heads, self.layer.num_kv_heads, self.layer.num_kv_heads)):
            whole = torch.randn((700, heads, self.layer.head_dim), generator=torch.Generator().manual_seed(name * 3 + kind))
            parts.append((whole * 2)[first : first + count].to(self.dtype))
        return tuple(parts)

    def step(self, *members: tuple[int, int, int]) -> None:
        """(sequence, name of its tokens, count) each."""
        given = [self.tokens(name, self.done[index], count) for index, name, count in members]
        starts, lengths, slots = [0], [], []
        for index, _, count in members:
            first, table = self.done[index], self.tables[index]
            slots += [table[p // SIZE] * SIZE + p % SIZE for p in range(first, first + count)]
            starts.append(len(slots))
            self.done[index] = first + count
            lengths.append(first + count)
        width = max(-(-length // SIZE) for length in lengths)
        tables = [(self.tables[index] + [0] * width)[:width] for index, _, _ in members]
        metadata = self.backend.prepare(
            StepTensors(
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(lengths, dtype=torch.int32),
                torch.tensor(tables, dtype=torch.int32),
                torch.tensor(slots),
            )
        )
        query, key, value = (torch.cat([one[part] for one in given]) for part in range(3))
        output = self.backend.attend(query, key, value, 0, metadata, self.sinks)
        for (index, _, _), first, last in zip(members, starts, starts[1:], strict=False):
            self.out[index].append(output[first:last])
        for kind, count in metadata.plan(self.layer).kinds().items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def result(self, index: int) -> torch.Tensor:
        return torch.cat(self.out[index])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=VARIANTS)
def layer(request: pytest.FixtureRequest) -> LayerSpec:
    return VARIANTS[request.param]


def alone(native: Any, layer: LayerSpec, dtype: torch.dtype, name: int, length: int) -> torch.Tensor:
    """One sequence by one thread, its prompt in one piece, nothing shared or split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        life = Life(CpuBackend(native=native), layer, dtype, [list(range(50))])
        life.step((0, name, length))
    finally:
        torch.set_num_threads(before)
    assert not life.kinds["part"]
    return life.result(0)


def same(native: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit; where many rows go through matrix tiles and few through vectors, all but some last bits."""
    if native.isa != "amx" or one.dtype is torch.float32:
        return torch.equal(one, other)
    difference, scale = (one.float() - other.float()).abs(), other.float().abs()
    return bool((difference <= 2**-7 * torch.maximum(scale, scale.mean())).all()) and bool((difference > 0).float().mean() < 0.01)


def test_how_a_prompt_is_cut_changes_no_bit(native: Any, layer: LayerSpec, dtype: torch.dtype) -> None:
    life = Life(CpuBackend(native=native), layer, dtype, [list(range(50))])
    for count in (5, 124, 1, 1, 130, 16, 1, 22):
        life.step((0, 7, count))
    assert same(native, life.result(0), alone(native, layer, dtype, 7, 300))


def test_who_is_beside_it_changes_no_bit(native: Any, layer: LayerSpec, dtype: torch.dtype) -> None:
    life = Life(CpuBackend(native=native), layer, dtype, [list(range(50)), list(range(60, 110)), list(range(120, 170))])
    life.step((0, 7, 200), (1, 8, 3), (2, 9, 33))
    for _ in range(3):
        life.step((2, 9, 40), (0, 7, 1), (1, 8, 1))
    assert same(native, life.result(0), alone(native, layer, dtype, 7, 203))


@pytest.mark.parametrize("length", [129, 256, 257, 300])
def test_a_prefix_that_is_read_once_for_all_changes_no_bit(
    native: Any, layer: LayerSpec, dtype: torch.dtype, length: int
) -> None:
    """Five sequences decode behind the blocks of one, and one that shares only the first block decodes among them."""
    whole = length // SIZE
    tables = [list(range(50))]
    tables += [[*range(whole), *range(60 + 20 * i, 80 + 20 * i)] for i in range(1, 5)]
    tables += [[0, *range(200, 230)]]
    life = Life(CpuBackend(native=native), layer, dtype, tables)
    life.step((0, 7, length))
    for index in range(1, 5):
        life.done[index] = whole * SIZE
        if length % SIZE:
            life.step((index, 7, length % SIZE))
    life.done[5] = SIZE
    life.step((5, 7, 150))
    before = dict(life.kinds)
    for _ in range(3):
        life.step(*((index, 7, 1) for index in (5, 3, 0, 1, 4, 2)))
    shared = life.kinds["prefix"] - before["prefix"]
    assert bool(shared) == (layer.window is None), "whether the prefix was read once"
    expected = alone(native, layer, dtype, 7, length + 3)
    for index in range(5):
        assert same(native, life.result(index)[-3:], expected[-3:]), f"sequence {index}"
    # Its context is what it wrote behind the first block of the others.
    assert same(native, life.result(5), alone(native, layer, dtype, 7, 169)[SIZE:])


def test_a_chunk_that_differs_in_its_last_block_is_not_shared(native: Any, dtype: torch.dtype) -> None:
    life = Life(CpuBackend(native=native), LAYER, dtype, [list(range(20)), [*range(15), *range(30, 40)]])
    life.step((0, 7, 300))
    life.done[1] = 15 * SIZE
    life.step((1, 9, 30))
    for _ in range(3):
        life.step((0, 7, 1), (1, 9, 1))
    assert life.kinds["prefix"] == 3, "the first chunk is shared"
    apart = Life(CpuBackend(native=native), LAYER, dtype, [list(range(50))])
    apart.step((0, 7, 15 * SIZE))
    apart.step((0, 9, 33))
    assert same(native, life.result(1), apart.result(0)[15 * SIZE :])
    assert same(native, life.result(0), alone(native, LAYER, dtype, 7, 303))


def test_a_long_sequence_that_is_split_changes_no_bit(native: Any, dtype: torch.dtype) -> None:
    layer = LayerSpec(2, 1, 64, 0.125)
    life = Life(CpuBackend(native=native), layer, dtype, [list(range(50))])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        life.step((0, 7, 690))
        for _ in range(3):
            life.step((0, 7, 1))
    finally:
        torch.set_num_threads(before)
    assert life.kinds["part"] >= 6
    assert life.kinds["merge"] == 3
    assert same(native, life.result(0), alone(native, layer, dtype, 7, 693))


def test_two_runs_are_equal(native: Any, layer: LayerSpec, dtype: torch.dtype) -> None:
    first, second = (alone(native, layer, dtype, 3, 140) for _ in range(2))
    assert torch.equal(first, second)

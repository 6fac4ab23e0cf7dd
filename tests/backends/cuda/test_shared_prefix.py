"""Decodes that begin with the same blocks read them once for all; a recorded step serves every later one of its signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv_backends.cuda.backend import CudaBackend
from streamkv_backends.torch_backend import TorchBackend
from streamkv_kernels.emulated import EmulatedDevice
from tests.backends.cuda.listening import Listening

HEADS, KV_HEADS, DIM, SIZE = 6, 3, 64, 16
LAYER = LayerSpec(HEADS, KV_HEADS, DIM, scale=0.125)
SPEC = KVSpec(400, SIZE, torch.float16, (LAYER, replace(LAYER, window=70), replace(LAYER, has_sinks=True)))
PREFIX = list(range(300, 340))  # blocks
Sequences = Sequence[tuple[list[int], int, int]]


@pytest.fixture(scope="module")
def listening(libraries: Path) -> Listening:
    return Listening(EmulatedDevice(cache=libraries))


@pytest.fixture
def backend(listening: Listening) -> CudaBackend:
    return filled(CudaBackend("emulated", kernels=listening), SPEC)


def filled(backend: Any, spec: KVSpec) -> Any:
    """The backend with the same numbers in every slot, whatever its layout and dtype."""
    pool = backend.allocate_kv(spec)
    random = torch.Generator().manual_seed(1)
    for layer in range(len(spec.layers)):
        blocks = torch.randn(2, spec.num_blocks, SIZE, KV_HEADS, DIM, generator=random).half()
        if isinstance(backend, CudaBackend):
            cache = pool.caches[layer]
            cache.keys.copy_(blocks[0].transpose(1, 2))
            cache.values.copy_(blocks[1].transpose(1, 2))
        else:
            pool.slots(layer).copy_(blocks.flatten(1, 2))
    return backend


def step(sequences: Sequences) -> StepTensors:
    """Of each sequence: its blocks, its tokens after the step, how many of these are new."""
    width = max(len(blocks) for blocks, _, _ in sequences)
    slots = [
        blocks[position // SIZE] * SIZE + position % SIZE
        for blocks, length, new in sequences
        for position in range(length - new, length)
    ]
    starts = torch.tensor([0, *(new for _, _, new in sequences)]).cumsum(0)
    tables = [blocks + [-1] * (width - len(blocks)) for blocks, _, _ in sequences]
    lengths = [length for _, length, _ in sequences]
    return StepTensors(starts.int(), torch.tensor(lengths).int(), torch.tensor(tables).int(), torch.tensor(slots))


def streams(count: int, shared: int, own: int, first: int = 0, new: int = 1) -> list[tuple[list[int], int, int]]:
    """Sequences that share some blocks and go on for `own` tokens, more by one each."""
    blocks = -(-(own + count) // SIZE)
    return [
        (PREFIX[:shared] + list(range(first + i * blocks, first + (i + 1) * blocks)), shared * SIZE + own + i, new)
        for i in range(count)
    ]


def inputs(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(num_tokens, heads, DIM, generator=random).half() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return 2 * query, key, value


SINKS = torch.linspace(-1, 2, HEADS)


def attend(backend: Any, sequences: Sequences, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """[layer, token, head, column] of one step."""
    tensors = step(sequences)
    metadata = backend.prepare(tensors)
    given = [part.to(dtype) for part in inputs(len(tensors.slots), seed)]
    sinks = (None, None, SINKS.to(dtype))
    return torch.stack([backend.attend(*given, layer, metadata, sinks[layer]) for layer in range(3)])


MIXED = {
    "all share": streams(6, 20, 9),
    "two groups, drafts and others": streams(4, 12, 7) + streams(4, 30, 5, 40, new=3) + [([200, 201], 20, 1), ([203], 3, 3)],
    "beside chunks": [*streams(5, 8, 30), (PREFIX[:8] + list(range(220, 226)), 8 * SIZE + 90, 40), ([230, 231], 30, 30)],
    "a prefix that ends with a block": [([*PREFIX[:6], i], 6 * SIZE + 1, 1) for i in range(4)],
}


@pytest.mark.parametrize("name", MIXED)
def test_as_exact_as_torch(backend: CudaBackend, listening: Listening, name: str) -> None:
    listening.take()
    found = attend(backend, MIXED[name])
    names = [launch.name for launch in listening.take()]
    assert names.count("attn_prefill") >= 2, "one a layer without a window"
    exact = attend(filled(TorchBackend(), replace(SPEC, dtype=torch.float32)), MIXED[name], dtype=torch.float32)
    plain = attend(filled(TorchBackend(), SPEC), MIXED[name])
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    "sequences",
    [
        streams(3, 20, 9),
        streams(6, 3, 9),
        [(PREFIX[:4], 4 * SIZE, 1)] * 4,  # the step fills the fourth block
        streams(6, 20, 30, new=25),
    ],
    ids=["few sequences", "few blocks", "not full", "chunks"],
)
def test_what_is_not_worth_it(backend: CudaBackend, sequences: Sequences) -> None:
    assert not any(work.shared for work in backend.prepare(step(sequences)).work.values())


def test_a_prefix_is_read_once(libraries: Path) -> None:
    watched = Listening(EmulatedDevice(cache=libraries, checked=True, optimize=1, record_traffic=True))
    layer = replace(LAYER, num_heads=2, num_kv_heads=1)
    backend = CudaBackend("emulated", kernels=watched)
    backend.allocate_kv(KVSpec(400, SIZE, torch.float16, (layer,)))

    def sectors(sequences: Sequences) -> int:
        watched.take()
        query, key, value = (part[:, :2] if part.shape[1] == HEADS else part[:, :1] for part in inputs(len(sequences), 0))
        backend.attend(query, key, value, 0, backend.prepare(step(sequences)))
        return sum(launch.counters["global_sectors"] for launch in watched.take() if launch.name != "kv_write")

    together = streams(8, 20, 10)
    alone = [([*range(i * 25, i * 25 + 22)], length, new) for i, (_, length, new) in enumerate(together)]
    own = streams(8, 0, 10)
    a_prefix = 20 * SIZE * 2 * DIM * 2 // 32  # sectors of keys and values
    assert sectors(alone) > 8 * a_prefix
    assert sectors(together) < sectors(own) + 2 * a_prefix
    assert a_prefix < sectors(together) < 0.3 * sectors(alone)


def test_a_recorded_step_serves_every_other_of_its_signature(backend: CudaBackend, listening: Listening) -> None:
    """Nothing but the contents of its tensors has changed: other sequences, lengths, groups."""
    first, other = streams(5, 20, 9) + streams(1, 0, 80, 50), streams(4, 11, 60, 100) + streams(2, 0, 300, 150)
    attend(backend, streams(9, 30, 9) + streams(9, 0, 60, 50))  # room for everything
    tensors, later = step(first), step(other)
    metadata = backend.prepare(tensors)
    generation = backend.generation
    given, next_given = inputs(6, 1), inputs(6, 2)
    listening.take()
    recorded = backend.attend(*given, 0, metadata)
    launches = listening.take()
    expected = backend.attend(*next_given, 0, backend.prepare(later))
    backend.prepare(step(streams(3, 0, 5)))
    for mine, new in zip(given, next_given, strict=True):
        mine.copy_(new)
    assert backend.prepare(later).signature == metadata.signature is not None
    assert backend.generation == generation
    for launch in launches:
        launch.bound.launch(launch.grid, launch.block)
    assert torch.equal(recorded, expected)


def test_signatures_tell_other_launches_apart(backend: CudaBackend) -> None:
    def signature(sequences: Sequences) -> Any:
        return backend.prepare(step(sequences)).signature

    plain, shared = signature(streams(6, 3, 9)), signature(streams(6, 20, 9))
    assert plain == signature(streams(2, 0, 9))
    assert len({plain, shared}) == 2
    assert signature(streams(6, 20, 60, new=40)) is None, "prefills"


def test_growing_is_told(backend: CudaBackend) -> None:
    generations = [backend.generation]
    for sequences in (streams(20, 0, 5), streams(60, 0, 5), streams(65, 0, 5), streams(66, 0, 5), streams(2, 0, 400), []):
        if sequences:
            backend.prepare(step(sequences))
        else:
            backend.allocate_kv(SPEC)
        generations.append(backend.generation)
    assert [b - a for a, b in pairwise(generations)] == [0, 0, 1, 0, 0, 1]


def test_idle_pieces_touch_nothing(libraries: Path) -> None:
    """Three KV heads make six merges of two groups: two are idle, and pieces are too."""
    careful = EmulatedDevice(cache=libraries, checked=True, optimize=1)
    backend = filled(CudaBackend("emulated", kernels=careful), replace(SPEC, layers=(LAYER,)))
    sequences = streams(4, 12, 7) + streams(4, 30, 5, 40)
    tensors = step(sequences)
    metadata = backend.prepare(tensors)
    (work,) = metadata.work.values()
    assert work.shared is not None
    assert (work.shared.pieces.merges[:, 2] == 0).sum() == 2
    plain = filled(CudaBackend("emulated", kernels=replace(careful, checked=False, optimize=2)), replace(SPEC, layers=(LAYER,)))
    given = inputs(len(sequences), 0)
    assert torch.equal(backend.attend(*given, 0, metadata), plain.attend(*given, 0, plain.prepare(tensors)))

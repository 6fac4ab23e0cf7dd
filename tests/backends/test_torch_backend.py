"""What the torch backend promises beyond the contract."""

from __future__ import annotations

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv_backends.torch_backend import TorchBackend

SIZE, BLOCKS = 8, 40
# new tokens and context of each sequence: chunks, decodes, first and later ones
SEQUENCES = ((1, 1), (1, 30), (5, 5), (7, 20), (1, 17), (20, 41))
LAYERS = {
    "grouped": LayerSpec(4, 2, 64, 0.125),
    "window": LayerSpec(4, 2, 64, 0.125, window=6),
    "soft-cap and sinks": LayerSpec(4, 4, 32, 0.2, soft_cap=5.0, has_sinks=True),
}


def run(layer: LayerSpec, chosen: list[int]) -> dict[int, torch.Tensor]:
    """Attend for the chosen sequences in one step; their numbers and blocks are the same whoever else is there."""
    backend = TorchBackend()
    pool = backend.allocate_kv(KVSpec(BLOCKS, SIZE, torch.float32, (layer,)))
    random = torch.Generator().manual_seed(1)
    pool.slots(0).copy_(torch.randn(pool.slots(0).shape, generator=random))
    shape = (sum(new for new, _ in SEQUENCES), layer.num_heads + 2 * layer.num_kv_heads, layer.head_dim)
    packed = list(torch.randn(shape, generator=random).split([new for new, _ in SEQUENCES]))
    sinks = torch.randn(layer.num_heads, generator=random) if layer.has_sinks else None
    first = [0]
    for _, context in SEQUENCES:
        first.append(first[-1] + -(-context // SIZE))
    assert first[-1] <= BLOCKS
    tables = torch.zeros((len(chosen), 8), dtype=torch.int32)
    slots: list[int] = []
    for row, index in enumerate(chosen):
        new, context = SEQUENCES[index]
        blocks = list(range(first[index], first[index + 1]))
        tables[row, : len(blocks)] = torch.tensor(blocks)
        slots += [first[index] * SIZE + position for position in range(context - new, context)]
    counts = [SEQUENCES[index][0] for index in chosen]
    metadata = backend.prepare(
        StepTensors(
            query_start=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([SEQUENCES[index][1] for index in chosen], dtype=torch.int32),
            block_tables=tables,
            slots=torch.tensor(slots),
        )
    )
    query, key, value = torch.split(
        torch.cat([packed[index] for index in chosen]), [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1
    )
    output = backend.attend(query, key, value, 0, metadata, sinks)
    return dict(zip(chosen, output.split(counts), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_in_float32_a_sequence_does_not_depend_on_its_neighbours(name: str) -> None:
    together = run(LAYERS[name], list(range(len(SEQUENCES))))
    backwards = run(LAYERS[name], list(reversed(range(len(SEQUENCES)))))
    for index in range(len(SEQUENCES)):
        alone = run(LAYERS[name], [index])[index]
        assert torch.equal(alone, together[index]), f"sequence {index} alone and in a batch: bits differ"
        assert torch.equal(alone, backwards[index]), f"sequence {index} in another order: bits differ"


def test_a_step_of_nothing_but_padding() -> None:
    backend = TorchBackend()
    pool = backend.allocate_kv(KVSpec(2, SIZE, torch.float32, (LAYERS["grouped"],)))
    step = StepTensors(
        query_start=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.zeros(2, dtype=torch.int32),
        block_tables=torch.zeros((2, 1), dtype=torch.int32),
        slots=torch.tensor([-1, -1]),
    )
    output = backend.attend(torch.ones(2, 4, 64), torch.ones(2, 2, 64), torch.ones(2, 2, 64), 0, backend.prepare(step))
    assert torch.equal(output, torch.zeros(2, 4, 64))
    assert (pool.slots(0) == 0).all()

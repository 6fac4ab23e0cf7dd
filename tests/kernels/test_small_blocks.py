"""blocks.cu: blocks of a pool as bytes, whatever the layout; against a model in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv_backends.contract.pool import COPIES
from streamkv_kernels.blocks import BlockMover, Pieces
from streamkv_kernels.emulated import EmulatedDevice
from tests.kernels.small import in_every_schedule

CHUNK = 4096  # several chunks to a piece without megabytes
BLOCKS = 6
LAYOUTS = {
    "block first": Pieces(8240, 1, 16, 8240),
    "block first, with a gap": Pieces(4240, 1, 16, 4128),
    "layer first": Pieces(1616, 3, 1616 * BLOCKS, 1616),
    "a piece larger than a chunk, a layer apart": Pieces(8208, 2, 8208 * BLOCKS + 64, 8208),
}


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make(pieces: Pieces) -> torch.Tensor:
    """As small as a pool for six blocks can be."""
    return random_bytes((BLOCKS - 1) * pieces.block_stride + (pieces.count - 1) * pieces.stride + pieces.size)


def places(pieces: Pieces, block: int) -> list[slice]:
    starts = [block * pieces.block_stride + piece * pieces.stride for piece in range(pieces.count)]
    return [slice(start, start + pieces.size) for start in starts]


def contents(pool: torch.Tensor, pieces: Pieces, block: int) -> torch.Tensor:
    return torch.cat([pool[place] for place in places(pieces, block)])


def moves_as_the_model(device: EmulatedDevice, layout: str, pairs: list[tuple[int, int]], ids: list[int], word: int) -> None:
    """Copy, gather, scatter and fill; every byte of the pool is looked at after each."""
    pieces = LAYOUTS[layout]
    pool = make(pieces)
    model = pool.clone()
    mover = BlockMover(device, pool, pieces, chunk=CHUNK)
    assert mover.num_blocks == BLOCKS

    mover.copy(pairs)
    sources = [contents(model, pieces, source) for source, _ in pairs]
    for (_, target), source in zip(pairs, sources, strict=True):
        for place, part in zip(places(pieces, target), source.split(pieces.size), strict=True):
            model[place] = part
    assert torch.equal(pool, model), f"copy({pairs})"

    gathered = mover.gather(ids)
    assert gathered.shape == (len(ids), pieces.bytes_per_block)
    assert all(torch.equal(row, contents(model, pieces, block)) for row, block in zip(gathered, ids, strict=True))
    assert torch.equal(pool, model), f"gather({ids})"

    once = list(dict.fromkeys(ids))
    data = random_bytes(len(once), pieces.bytes_per_block, seed=1)
    mover.scatter(once, data)
    for block, row in zip(once, data, strict=True):
        for place, part in zip(places(pieces, block), row.split(pieces.size), strict=True):
            model[place] = part
    assert torch.equal(pool, model), f"scatter({once})"

    mover.fill(ids[:2], word)
    for block in ids[:2]:
        for place in places(pieces, block):
            model[place] = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8).repeat(pieces.size // 4)
    assert torch.equal(pool, model), f"fill({ids[:2]})"


block = st.integers(0, BLOCKS - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.dictionaries(block, block, max_size=BLOCKS),
    st.lists(block, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_blocks_move_as_in_the_model(
    plain: EmulatedDevice, layout: str, targets: dict[int, int], ids: list[int], word: int
) -> None:
    pairs = [(source, target) for target, source in targets.items()]
    for device in in_every_schedule(plain):
        moves_as_the_model(device, layout, pairs, ids, word)


def copies_of_the_contract(device: EmulatedDevice) -> None:
    """Chains and swaps in every layout: what the contract of backends asks of a pool."""
    for layout in LAYOUTS:
        for pairs, _ in COPIES:
            moves_as_the_model(device, layout, pairs, [3, 1, 3], 0x7FC07FC0)


def test_copies_of_the_contract(plain: EmulatedDevice) -> None:
    copies_of_the_contract(plain)


def test_the_checked_build_finds_nothing(checked: EmulatedDevice) -> None:
    moves_as_the_model(checked, "layer first", [(0, 1), (1, 0)], [5, 0], 0)


def test_one_launch_is_enough_where_nothing_overlaps(plain: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = LAYOUTS["layer first"]
    mover = BlockMover(plain, make(pieces), pieces, chunk=CHUNK)
    launches: list[int] = []
    monkeypatch.setattr(mover, "_move", lambda _to, _from, count: launches.append(count))
    mover.copy([(0, 1), (0, 2), (3, 3)])
    assert launches == [2]
    mover.copy([])
    assert launches == [2]
    mover.copy([(0, 1), (1, 2)])  # 1 is saved first
    assert launches == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.copy([(0, 6)]), "block 6 of a pool of 6"),
        (lambda m: m.copy([(1, 2), (2, 1), (-1, 0)]), "block -1"),
        (lambda m: m.copy([(0, 2), (1, 2)]), "a destination twice"),
        (lambda m: m.gather([7]), "block 7"),
        (lambda m: m.scatter([1, 1], random_bytes(2, 3 * 1616)), "a block twice"),
        (lambda m: m.scatter([1], random_bytes(1, 1616)), r"data has the shape \[1, 1616\]"),
        (lambda m: m.scatter([1], torch.zeros(1, 3 * 1616, dtype=torch.int8)), "data is int8"),
        (lambda m: m.scatter([1], random_bytes(3 * 1616 + 1)[None, 1:]), "data must begin at a multiple of 16"),
        (lambda m: m.fill([1], 2**32), "must have four bytes"),
        (lambda m: m.fill([9], 0), "block 9"),
    ],
)
def test_what_does_not_fit_is_named(plain: EmulatedDevice, call: Callable[[BlockMover], object], says: str) -> None:
    pool = make(LAYOUTS["layer first"])
    before = pool.clone()
    with pytest.raises(ValueError, match=says):
        call(BlockMover(plain, pool, LAYOUTS["layer first"], chunk=CHUNK))
    assert torch.equal(pool, before)


def test_a_pool_that_does_not_fit_is_named(plain: EmulatedDevice) -> None:
    with pytest.raises(ValueError, match="size is 20"):
        Pieces(32, 1, 16, 20)
    with pytest.raises(ValueError, match="count is 0"):
        Pieces(32, 0, 16, 16)
    with pytest.raises(ValueError, match="holds no block"):
        BlockMover(plain, random_bytes(15), Pieces(16, 1, 16, 16))
    with pytest.raises(ValueError, match="chunk is 24"):
        BlockMover(plain, random_bytes(16), Pieces(16, 1, 16, 16), chunk=24)

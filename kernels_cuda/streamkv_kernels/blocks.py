"""Host side of blocks.cu: whole blocks of a pool copied, gathered, scattered, filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from streamkv_kernels.checks import aligned, check, positive_multiple
from streamkv_kernels.device import Argument, Device, Variant
from streamkv_kernels.uploads import upload

__all__ = ["BlockMover", "Pieces"]

_THREADS: Final = 256
_CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the blocks of a pool lie, in bytes, all multiples of 16.

    Block first: one piece, which is the block. Layer first: a piece a layer, or a layer's keys and its values.

    Attributes:
        block_stride: from a block to the next.
        count: pieces of a block.
        stride: from a piece of a block to the next one.
        size: of a piece.
    """

    block_stride: int
    count: int
    stride: int
    size: int

    def __post_init__(self) -> None:
        """See that they can be moved in vectors.

        Raises:
            ValueError: a number is no multiple of 16.
        """
        positive_multiple("block_stride", self.block_stride, 16)
        positive_multiple("size", self.size, 16)
        if self.count != 1:
            positive_multiple("stride", self.stride, 16)
        if self.count < 1:
            raise ValueError(f"count is {self.count}, and must be at least 1")

    @property
    def bytes_per_block(self) -> int:
        """What a block holds."""
        return self.count * self.size


class BlockMover:
    """Moves the blocks of one pool. Block ids are checked: a wrong one would reach memory of somebody else."""

    def __init__(self, device: Device, pool: torch.Tensor, pieces: Pieces, *, chunk: int = _CHUNK) -> None:
        """Compile, or load what is compiled.

        Args:
            pool: uint8, one dimension.
            chunk: bytes that a thread block moves.

        Raises:
            ValueError: no block fits into the pool.
        """
        check("pool", pool, torch.uint8, [None])
        positive_multiple("chunk", chunk, 16)
        used = (pieces.count - 1) * pieces.stride + pieces.size
        self.num_blocks = (len(pool) - used) // pieces.block_stride + 1 if len(pool) >= used else 0
        if not self.num_blocks or not aligned(pool):
            raise ValueError(f"pool of {len(pool)} bytes holds no block of {used} bytes, or does not begin at a multiple of 16")
        self._pool, self._pieces, self._chunk = pool, pieces, chunk
        variant = Variant("blocks", (("CHUNK", chunk),))
        self._copy = device.kernel(variant, "copy_blocks")
        self._fill = device.kernel(variant, "fill_blocks")

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination); all sources are read before any destination is written.

        A launch has no order, so a source that is a destination too is saved first: two small launches more, and only for
        chains and swaps.

        Raises:
            ValueError: there is no such block, or a block is a destination twice.
        """
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        self._ids([block for pair in pairs for block in pair])  # before anything is written
        written = {target for _, target in pairs}
        if len(written) < len(pairs):
            raise ValueError("pairs name a destination twice")
        saved = [pair for pair in pairs if pair[0] in written]
        direct = [pair for pair in pairs if pair[0] not in written]
        contents = self.gather([source for source, _ in saved])
        if direct:
            sources, targets = (self._ids(side) for side in zip(*direct, strict=True))
            self._move(self._side(targets), self._side(sources), len(direct))
        self.scatter([target for _, target in saved], contents)

    def gather(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of blocks, [len(block_ids), bytes_per_block] uint8 on the pool's device: piece after piece.

        Raises:
            ValueError: there is no such block.
        """
        shape = (len(block_ids), self._pieces.bytes_per_block)
        out = torch.empty(shape, dtype=torch.uint8, device=self._pool.device)
        if block_ids:
            self._move(self._dense(out), self._side(self._ids(block_ids)), len(block_ids))
        return out

    def scatter(self, block_ids: Sequence[int], data: torch.Tensor) -> None:
        """Inverse of `gather`; no block twice.

        Raises:
            ValueError: an argument does not fit; nothing is written.
        """
        check("data", data, torch.uint8, [len(block_ids), self._pieces.bytes_per_block])
        if len(set(block_ids)) < len(block_ids):
            raise ValueError("block_ids name a block twice")
        if not aligned(data):
            raise ValueError("data must begin at a multiple of 16 bytes")
        if block_ids:
            self._move(self._side(self._ids(block_ids)), self._dense(data), len(block_ids))

    def fill(self, block_ids: Sequence[int], word: int) -> None:
        """Fill whole blocks with four bytes, over and over.

        Args:
            word: 0 <= word < 2**32; its lowest byte comes first.

        Raises:
            ValueError: there is no such block, or `word` has more than four bytes.
        """
        if not 0 <= word < 2**32:
            raise ValueError(f"word is {word}, and must have four bytes")
        if block_ids:
            base, ids, block_stride, stride = self._side(self._ids(block_ids))
            grid = self._grid(len(block_ids))
            pieces = self._pieces
            self._fill.launch(grid, (_THREADS, 1, 1), base, ids, block_stride, stride, pieces.count, pieces.size, word)

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        wrong = [block for block in block_ids if not 0 <= block < self.num_blocks]
        if wrong:
            raise ValueError(f"block_ids name block {wrong[0]} of a pool of {self.num_blocks}")
        ids = torch.empty(len(block_ids), dtype=torch.int64, device=self._pool.device)
        upload(ids, torch.tensor(block_ids, dtype=torch.int64))
        return ids

    def _side(self, ids: torch.Tensor) -> tuple[Argument, ...]:
        return self._pool, ids, self._pieces.block_stride, self._pieces.stride

    def _dense(self, data: torch.Tensor) -> tuple[Argument, ...]:
        return data, None, self._pieces.bytes_per_block, self._pieces.size

    def _move(self, to: tuple[Argument, ...], source: tuple[Argument, ...], count: int) -> None:
        self._copy.launch(self._grid(count), (_THREADS, 1, 1), *to, *source, self._pieces.count, self._pieces.size)

    def _grid(self, count: int) -> tuple[int, int, int]:
        return count * self._pieces.count, -(-self._pieces.size // self._chunk), 1

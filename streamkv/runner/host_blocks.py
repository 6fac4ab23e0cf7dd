"""Host memory for blocks of preempted requests: the scheduler says which block goes to which slot and back.

A slot holds what `KVPool.read` says of a block. On a GPU the slots are pinned, a move is one copy for all blocks whose slots lie
side by side, and nobody waits for it: what is moved in was moved out earlier in the order of the same stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

from streamkv.attention import KVPool
from streamkv.errors import ConfigError

__all__ = ["HostBlocks"]


@runtime_checkable
class _ReadsLater(Protocol):
    """A pool on a GPU, which can read without waiting."""

    def begin_read(self, block_ids: list[int], data: torch.Tensor | None = None) -> torch.Tensor:
        """As `read`, into `data`: there when the stream has come so far."""


class HostBlocks:
    """The slots, [num_slots, bytes of a block] uint8. Lives in the runner's thread."""

    def __init__(self, pool: KVPool, num_bytes: int = 0, *, pinned: bool = False) -> None:
        """Allocate as many whole slots as `num_bytes` hold; on the CPU they take memory when they are first written.

        Raises:
            ConfigError: there is not so much memory.
        """
        self._pool = pool
        width = pool.read([]).shape[1]
        try:
            self._slots = torch.empty((num_bytes // width, width), dtype=torch.uint8, pin_memory=pinned)
        except (RuntimeError, MemoryError) as error:
            message = f"{num_bytes / 2**30:.1f} GiB for swapped blocks cannot be allocated; give less, or 0"
            raise ConfigError(message, param="swap_memory") from error

    @property
    def num_slots(self) -> int:
        """How many blocks it keeps."""
        return len(self._slots)

    def swap_out(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks to slots; pairs (block, slot)."""
        for block_ids, slots in self._side_by_side(pairs):
            if isinstance(self._pool, _ReadsLater):
                self._pool.begin_read(block_ids, slots)
            else:
                slots.copy_(self._pool.read(block_ids))

    def swap_in(self, pairs: list[tuple[int, int]]) -> None:
        """Copy slots to blocks; pairs (block, slot)."""
        for block_ids, slots in self._side_by_side(pairs):
            self._pool.write(block_ids, slots)

    def _side_by_side(self, pairs: list[tuple[int, int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The pairs in parts whose slots follow each other: block ids, and their slots as one piece of memory."""
        first = 0
        for end in range(1, len(pairs) + 1):
            if end == len(pairs) or pairs[end][1] != pairs[end - 1][1] + 1:
                yield [block for block, _ in pairs[first:end]], self._slots[pairs[first][1] : pairs[end - 1][1] + 1]
                first = end

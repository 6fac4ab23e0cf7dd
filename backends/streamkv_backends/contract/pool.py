"""The pool by itself: copy, read, write and fill, without a word on its layout."""

from __future__ import annotations

from typing import Final

import torch

from streamkv.attention import KVPool
from streamkv_backends.contract.judge import require

__all__ = ["NAN", "check_pool"]

NAN: Final = float("nan")
MARKED: Final = 5

# pairs, and whose marks each of the five blocks then holds
COPIES: Final[tuple[tuple[list[tuple[int, int]], list[int]], ...]] = (
    ([], [0, 1, 2, 3, 4]),
    ([(0, 1)], [0, 0, 2, 3, 4]),
    ([(4, 0), (4, 2)], [4, 1, 4, 3, 4]),
    ([(0, 1), (1, 2), (2, 3)], [0, 0, 1, 2, 4]),
    ([(0, 1), (1, 0)], [1, 0, 2, 3, 4]),
)


def check_pool(pool: KVPool) -> None:
    """Use up a fresh pool of at least six blocks; afterwards every slot of it is NaN.

    Raises:
        AssertionError: which method is wrong, and how.
    """
    everything = list(range(pool.spec.num_blocks))
    ids = everything[:MARKED]
    fresh = pool.read(everything).clone()
    require(fresh.dtype == torch.uint8 and fresh.device.type == "cpu", "read does not return uint8 on the CPU")
    require(fresh.dim() == 2 and len(fresh) == len(everything), "read does not return [len(block_ids), num_bytes]")
    marked = _mark(pool, ids, fresh)
    _check_copy(pool, marked, fresh[MARKED:])
    _check_write(pool, marked)
    pool.fill(ids, 0.0)
    require(torch.equal(pool.read(everything), fresh), "a fresh pool is not zeroed, or fill(0) does not zero a block")
    pool.fill(everything, NAN)  # from here on a slot is readable only once it has been written
    require(not torch.equal(pool.read(everything), fresh), "fill(NaN) leaves the pool as it was")


def _mark(pool: KVPool, ids: list[int], fresh: torch.Tensor) -> torch.Tensor:
    """Give five blocks different contents; what `read` says they are."""
    for block in ids:
        pool.fill([block], block + 1.0)
    rows = pool.read(list(range(pool.spec.num_blocks)))
    marked = rows[:MARKED].clone()
    require(len({bytes(row.tolist()) for row in marked}) == MARKED, "fill and read do not tell five different values apart")
    require(torch.equal(rows[MARKED:], fresh[MARKED:]), "fill changes blocks that it was not given")
    require(torch.equal(pool.read([3, 1, 3]), marked[[3, 1, 3]]), "read([3, 1, 3]) does not return those blocks in that order")
    require(pool.read([]).shape == (0, fresh.shape[1]), "read([]) is not [0, num_bytes]")
    return marked


def _check_copy(pool: KVPool, marked: torch.Tensor, rest: torch.Tensor) -> None:
    ids = list(range(MARKED))
    for pairs, expected in COPIES:
        pool.write(ids, marked)
        pool.copy(pairs)
        rows = pool.read(list(range(pool.spec.num_blocks)))
        require(torch.equal(rows[MARKED:], rest), f"copy({pairs}) changes blocks that it was not given")
        held = [next((i for i in ids if torch.equal(row, marked[i])), None) for row in rows[:MARKED]]
        require(
            held == expected,
            f"after copy({pairs}) the blocks hold the contents of {held} instead of {expected}: "
            "whole blocks are copied, all sources are read before any destination is written",
        )


def _check_write(pool: KVPool, marked: torch.Tensor) -> None:
    order = [2, 0, 4, 1, 3]
    data = marked.clone()
    pool.write(order, data)
    data.zero_()
    kept = pool.read(order)
    require(torch.equal(kept, marked), "read does not return what write was given")
    pool.write([], pool.read([]))
    pool.fill([], 7.0)
    require(torch.equal(pool.read(order), marked), "write or fill of no block changes one")
    pool.fill(order, NAN)
    require(torch.equal(kept, marked), "what read returned changes when the pool does")

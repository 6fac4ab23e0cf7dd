"""Which block of the prefill kernel computes what: a list of tiles, longest first, made once a step from lengths alone.

    tile    `rows` packed rows of one sequence (query token x head of the group) and the tokens that they see
    piece   a tile, or one of several that divide a tile's tokens: then each leaves a state, and attn_merge joins them

A tile costs the steps of 64 tokens that it reads. Two blocks run on each multiprocessor; a tile that takes longer than an equal
share of the whole is cut into pieces, so that a lone chunk on a long context keeps them all busy. Where all shares are large
nothing is cut. The cut depends on the lengths and the number of multiprocessors only: equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamkv_kernels.attention import TILE

__all__ = ["STEP", "PrefillPlan", "Shape", "SharedPlan", "plan_prefill", "plan_shared", "shared_prefixes"]

STEP: Final = 64  # tokens, the unit of cost
MIN_PIECE: Final = 8  # steps: a shorter piece is not worth its state
BLOCKS_PER_SM: Final = 2
ROWS: Final = (64, 128)  # packed rows of a tile that the kernel is compiled for
_IDLE_PIECE: Final = (0, 1 << 30, 0, 0, 0, 1, 0, 0)  # no sequence has so many rows, and it sees no token
_IDLE_MERGE: Final = (0,) * 8

Ints = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What the host tells the kernels about a step.

    Attributes:
        rows: packed rows of a piece, 64 or 128.
        pieces: [num_pieces, 8] int32: sequence, first packed row, first token, end of tokens, state, how many pieces the rows
            have, whether they have a prefix, 0. KV head h leaves state `state + h * how many`; where `state` is -1 there is no
            other piece, and the output itself is written.
        num_states: how many are left.
        merges: [num_merges, 8] int32, what attn_merge.cu joins.
    """

    rows: int
    pieces: Ints
    num_states: int
    merges: Ints


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What the host tells the kernels about prefixes that groups of sequences share.

    Attributes:
        pieces: every one leaves a state. Idle ones fill the lists up to powers of two: few CUDA graphs serve many steps.
        block_tables: [num_groups, blocks] int32.
        row_start: [num_groups + 1] int32, where the rows of each group begin in `row_index`.
        lengths: [num_groups] int32, tokens.
        row_index: [num_rows] int32, tokens of the batch.
    """

    pieces: PrefillPlan
    block_tables: Ints
    row_start: Ints
    lengths: Ints
    row_index: Ints

    @property
    def launches(self) -> tuple[int, int, int]:
        """What a launch is fixed to: rows of a piece, pieces, merges."""
        return self.pieces.rows, len(self.pieces.pieces), len(self.pieces.merges)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan is for.

    Attributes:
        group: query heads a KV head.
        num_kv_heads: KV heads.
        num_sms: multiprocessors to keep busy.
        max_rows: 64 where the kernel exists with 64 rows only (head_dim over 128).
    """

    group: int
    num_kv_heads: int
    num_sms: int
    max_rows: int = ROWS[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of the kernel that run at a time."""
        return self.num_sms * BLOCKS_PER_SM

    def rows_for(self, packed: Ints) -> int:
        """Packed rows of a piece: many if that still makes pieces for every multiprocessor."""
        wide = int((-(-packed // ROWS[1])).sum()) * self.num_kv_heads >= self.num_blocks
        return ROWS[1] if wide and self.max_rows >= ROWS[1] else ROWS[0]


def plan_prefill(
    query_lens: Ints,
    seq_lens: Ints,
    shape: Shape,
    *,
    window: int | None = None,
    chosen: NDArray[np.bool_] | None = None,
    prefix_lens: Ints | None = None,
) -> PrefillPlan:
    """Pieces of the new tokens of a step's sequences, causal.

    Args:
        query_lens: [num_seqs], new tokens of each sequence; 0 = none.
        seq_lens: [num_seqs], tokens after this step.
        shape: what it is for.
        window: of the layers that the plan is for; None = full attention.
        chosen: [num_seqs], sequences to plan for; None = all (the others are decoded).
        prefix_lens: [num_seqs], leading tokens that are attended to elsewhere, whole blocks before the new tokens; None = 0.
    """
    active = query_lens > 0 if chosen is None else (query_lens > 0) & chosen
    ids = np.flatnonzero(active)
    packed, contexts = query_lens[ids] * shape.group, (seq_lens - query_lens)[ids]
    rows = shape.rows_for(packed)
    owner, row = _tiles_of(packed, rows)
    count = np.minimum(rows, packed[owner] - row)
    context, prefix = contexts[owner], np.zeros_like(row) if prefix_lens is None else prefix_lens[ids][owner]
    first_seen = np.zeros_like(row) if window is None else np.maximum(0, context + row // shape.group - window + 1)
    begin = np.maximum(prefix, first_seen // TILE * TILE)
    tiles = _Tiles(
        sequence=ids[owner],
        row=row,
        count=count,
        begin=begin,
        end=np.maximum(begin, context + (row + count - 1) // shape.group + 1),  # padding has fewer tokens than rows
        first_row=(np.cumsum(query_lens) - query_lens)[ids][owner],
        has_prefix=prefix > 0,
    )
    return _cut(tiles, rows, shape, always_state=False)


def plan_shared(
    groups: list[tuple[list[int], int]], query_start: Ints, block_tables: Ints, block_size: int, shape: Shape
) -> SharedPlan:
    """Pieces of groups of sequences that attend, not causally, to the prefix they share.

    Args:
        groups: for each its sequences and how many leading blocks they have in common, `shared_prefixes`; at least one.
        query_start: [num_seqs + 1], first row of each sequence's new tokens.
        block_tables: [num_seqs, max_blocks].
        block_size: tokens of a block.
        shape: what it is for.
    """
    rows = [np.concatenate([np.arange(query_start[s], query_start[s + 1]) for s in members]) for members, _ in groups]
    num_rows = np.array([len(some) for some in rows])
    blocks = np.array([count for _, count in groups])
    return SharedPlan(
        pieces=_shared_pieces(num_rows, blocks * block_size, shape),
        block_tables=block_tables[[members[0] for members, _ in groups], : blocks.max()].astype(np.int32),
        row_start=np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int32),
        lengths=(blocks * block_size).astype(np.int32),
        row_index=np.concatenate(rows).astype(np.int32),
    )


def _shared_pieces(num_rows: Ints, lengths: Ints, shape: Shape) -> PrefillPlan:
    packed = num_rows * shape.group
    rows = shape.rows_for(packed)
    owner, row = _tiles_of(packed, rows)
    tiles = _Tiles(
        sequence=owner,
        row=row,
        count=np.minimum(rows, packed[owner] - row),
        begin=np.zeros_like(row),
        end=lengths[owner],
        first_row=(np.cumsum(num_rows) - num_rows)[owner],
        has_prefix=np.zeros(len(row), dtype=np.bool_),
    )
    plan = _cut(tiles, rows, shape, always_state=True)
    return replace(plan, pieces=_filled_up(plan.pieces, _IDLE_PIECE), merges=_filled_up(plan.merges, _IDLE_MERGE))


def _filled_up(lines: Ints, idle: tuple[int, ...]) -> Ints:
    """To a power of two."""
    missing = (1 << (len(lines) - 1).bit_length()) - len(lines)
    return np.concatenate([lines, np.tile(np.array(idle, dtype=np.int32), (missing, 1))])


@dataclass(frozen=True, slots=True)
class _Tiles:
    """All tiles, a number each.

    Attributes:
        sequence, row, count: its sequence, first packed row, packed rows.
        begin, end: tokens.
        first_row: where the new tokens of its sequence begin.
        has_prefix: whether leading tokens are attended to elsewhere.
    """

    sequence: Ints
    row: Ints
    count: Ints
    begin: Ints
    end: Ints
    first_row: Ints
    has_prefix: NDArray[np.bool_]


def _tiles_of(packed: Ints, rows: int) -> tuple[Ints, Ints]:
    """Of every tile the index of its sequence in `packed` and its first packed row."""
    owner, index = _repeated(-(-packed // rows))
    return owner, index * rows


def _repeated(counts: NDArray[Any]) -> tuple[Ints, Ints]:
    """[0] * counts[0] + [1] * counts[1] + ..., and the position of each within its own."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _cut(tiles: _Tiles, rows: int, shape: Shape, *, always_state: bool) -> PrefillPlan:
    """Cut what takes too long into pieces and order everything, longest first."""
    cost = -(-(tiles.end - tiles.begin) // STEP)
    share = max(MIN_PIECE, -(-int(cost.sum()) * shape.num_kv_heads // shape.num_blocks))
    pieces = np.maximum(1, (cost + share // 2) // share)  # to the nearest: half a share more is not worth a state
    tile, index = _repeated(pieces)
    begin = tiles.begin[tile] + index * cost[tile] // pieces[tile] * STEP
    end = np.minimum(tiles.end[tile], tiles.begin[tile] + (index + 1) * cost[tile] // pieces[tile] * STEP)
    joined = np.flatnonzero((pieces > 1) | always_state)
    states = np.zeros(len(pieces), dtype=np.int64)
    states[joined] = pieces[joined] * shape.num_kv_heads
    first_state = np.cumsum(states) - states
    state = np.where(states[tile] > 0, first_state[tile] + index, -1)
    table = _table(tiles.sequence[tile], tiles.row[tile], begin, end, state, pieces[tile], tiles.has_prefix[tile])
    order = np.argsort(begin - end, kind="stable")
    of, head = np.repeat(joined, shape.num_kv_heads), np.tile(np.arange(shape.num_kv_heads), len(joined))
    first = first_state[of] + head * pieces[of]
    merges = _table(tiles.first_row[of], tiles.row[of], tiles.count[of], head, first, pieces[of], tiles.has_prefix[of])
    return PrefillPlan(rows, table[order], int(states.sum()), merges)


def _table(*columns: NDArray[Any]) -> Ints:
    """Columns as lines of 8 numbers."""
    lines = np.zeros((len(columns[0]), 8), dtype=np.int32)
    for place, column in enumerate(columns):
        lines[:, place] = column
    return lines


def shared_prefixes(
    block_tables: Ints, shareable: Ints, *, min_blocks: int = 4, min_seqs: int = 4
) -> list[tuple[list[int], int]]:
    """Groups of sequences whose block tables begin alike: the most saved reads first, no sequence twice.

    Rows are sorted, so that those with a common prefix lie together, and what neighbours have in common is a histogram. The
    largest rectangle in it, blocks in common x (sequences - 1), is the group that saves most; then the same left and right of it.

    Args:
        block_tables: [num_seqs, max_blocks]; entries past a sequence's own are arbitrary.
        shareable: [num_seqs], leading blocks that are full and hold no token of this step.
        min_blocks: fewer blocks in common are not worth a pass of their own.
        min_seqs: nor are fewer sequences.

    Returns:
        For each group its sequences and the number of blocks in common.
    """
    width = int(shareable.max(initial=0))
    if width < min_blocks or len(block_tables) < min_seqs:
        return []
    # Past its own blocks a row holds -1, no block's id: the short one of two alike lies at their edge, not among them.
    tables = np.where(np.arange(width) < shareable[:, None], block_tables[:, :width], np.int32(-1))
    order = np.argsort(tables.view(np.dtype((np.void, tables.itemsize * width))).ravel(), kind="stable")
    ordered, limit = tables[order], shareable[order]
    differ = ordered[1:] != ordered[:-1]
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
    common = np.minimum(common, np.minimum(limit[1:], limit[:-1]))
    rows, heights = order.tolist(), common.tolist()
    found: list[tuple[list[int], int]] = []
    while (best := _largest(heights, min_blocks, min_seqs)) is not None:
        first, past, blocks = best
        found.append((sorted(rows[first : past + 1]), blocks))
        # What its neighbours on both sides have in common they have in common with all of the group.
        joint = [min(heights[first - 1 : past + 1])] if first > 0 and past < len(heights) else []
        rows[first : past + 1], heights[max(first - 1, 0) : past + 1] = [], joint
    return sorted(found, key=lambda group: (-(len(group[0]) - 1) * group[1], group[0]))


def _largest(heights: list[int], min_blocks: int, min_seqs: int) -> tuple[int, int, int] | None:
    """Range [first, past) of `heights` and its lowest, where length x lowest is largest; None if none is large enough."""
    best, stack = (0, 0, 0, 0), [(-1, -1)]  # (where a height begins, height), rising
    for index, height in enumerate([*heights, 0]):
        start = index
        while stack[-1][1] >= height and stack[-1][0] >= 0:
            start, lowest = stack.pop()
            if lowest >= min_blocks and index - start + 1 >= min_seqs:
                best = max(best, ((index - start) * lowest, start, index, lowest))
        stack.append((start, height))
    return best[1:] if best[0] else None

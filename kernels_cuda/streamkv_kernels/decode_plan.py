"""Which block of the decode kernel attends to what: an equal cut through everything, made once a step from lengths alone.

    tile    16 tokens of one sequence and KV head
    job     the tiles that one KV head's rows (at most 16: new tokens x query heads of the group) see
    share   consecutive tiles of all jobs in one line: what one block does
    piece   the part of a job that lies in a share; of a job in several pieces each leaves a state, attn_merge.cu joins them

The line is cut into as many equal shares as there are blocks (stream-K). A piece costs a start of its own and a state, so cuts
move by less than MIN_PIECE to where no piece is shorter than that, unless its job is. Nothing but lengths decides: equal inputs
give equal bits. Everything is a handful of operations on whole arrays, O(sequences + blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streamkv_kernels.attention import TILE

__all__ = ["MIN_PIECE", "ROWS", "DecodePlan", "plan_decode"]

ROWS: Final = 16
"""Packed rows of a job at most: those of an MMA."""
MIN_PIECE: Final = 8
"""Tiles, 128 tokens."""

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What the host tells the kernels about a step; the columns are those of the structs in attn_decode.cu and attn_merge.cu.

    Attributes:
        sequences: [n, 8] int32: id, first row, rows, end, begin, first tile, tiles of a job, jobs of a KV head.
        shares: [num_shares, 8] int32: sequence, job in it, tile in that, tiles, first state; those after the last one are empty.
        merges: [m, 8] int32, m < num_shares: first row, first packed row, packed rows, KV head, first state, states, has prefix.
        num_states: states that pieces leave, at most two a share.
    """

    sequences: Ints
    shares: Ints
    merges: Ints
    num_states: int


def plan_decode(
    query_start: Ints,
    seq_lens: Ints,
    *,
    group: int,
    num_kv_heads: int,
    num_shares: int,
    window: int | None = None,
    begins: Ints | None = None,
    chosen: NDArray[np.bool_] | None = None,
) -> DecodePlan:
    """Plan a step.

    Args:
        query_start: [num_seqs + 1], first row of each sequence's new tokens.
        seq_lens: [num_seqs], tokens after this step; 0 with rows = padding, whose rows become 0.
        group: query heads a KV head.
        num_kv_heads: KV heads.
        num_shares: blocks of the grid.
        window: of the layers that the plan is for; None = full attention.
        begins: [num_seqs], tokens that are attended to elsewhere (a shared prefix); None = none.
        chosen: [num_seqs], sequences to plan for; None = all that have new tokens.
    """
    sequences = _sequences(query_start, seq_lens, group, window, begins, chosen)
    tiles = sequences[:, 6].astype(np.int64)
    jobs = sequences[:, 7] * num_kv_heads
    starts = np.zeros(len(tiles) + 1, dtype=np.int64)  # of each sequence in the line
    np.cumsum(jobs * tiles, out=starts[1:])
    total = int(starts[-1])
    shares = np.zeros((num_shares, 8), dtype=np.int32)
    if total == 0:
        return DecodePlan(sequences, shares, np.zeros((0, 8), dtype=np.int32), 0)
    used = min(num_shares, max(total // MIN_PIECE, int(jobs.sum())))
    cuts = _cuts(starts, tiles, total, used)
    begin, end = cuts[:-1], cuts[1:]
    filled = end > begin
    owner, job, tile, size = _locate(starts, tiles, np.minimum(begin, total - 1))
    _, _, last_tile, last_size = _locate(starts, tiles, np.maximum(end, 1) - 1)
    job_start, last_start = begin - tile, end - 1 - last_tile
    first_partial = filled & ((tile > 0) | (job_start + size > end))
    last_partial = filled & (last_start > job_start) & (last_start + last_size > end)
    states = first_partial.astype(np.int64) + last_partial
    for number, column in enumerate((owner, job, tile, end - begin, np.cumsum(states) - states)):
        shares[:used, number] = column * filled
    # In the order of their states: where the job of each begins.
    job_starts = np.empty((used, 2), dtype=np.int64)
    job_starts[:, 0], job_starts[:, 1] = job_start, last_start
    partial = np.empty((used, 2), dtype=np.bool_)
    partial[:, 0], partial[:, 1] = first_partial, last_partial
    merges = _merges(sequences, starts, tiles, job_starts[partial], group)
    return DecodePlan(sequences, shares, merges, int(states.sum()))


def _sequences(
    query_start: Ints,
    seq_lens: Ints,
    group: int,
    window: int | None,
    begins: Ints | None,
    chosen: NDArray[np.bool_] | None,
) -> Ints:
    rows = np.diff(query_start)
    ids = np.flatnonzero(rows > 0 if chosen is None else (rows > 0) & chosen)
    rows, end = rows[ids], seq_lens[ids]
    begin = np.zeros_like(end) if begins is None else begins[ids]
    seen = begin if window is None else np.maximum(begin, end - rows + 1 - window)
    first_tile = seen // TILE
    table = np.empty((len(ids), 8), dtype=np.int32)
    # A padding sequence sees nothing; a tile of nothing makes its rows 0.
    columns = (
        ids,
        query_start[ids],
        rows,
        end,
        begin,
        first_tile,
        np.maximum(-(-end // TILE) - first_tile, 1),
        -(-rows * group // ROWS),
    )
    for number, column in enumerate(columns):
        table[:, number] = column
    return table


def _locate(starts: Longs, tiles: Longs, places: Longs) -> tuple[NDArray[np.intp], Longs, Longs, Longs]:
    """Of places in the line: sequence, job in it, tile in that, tiles of the job."""
    owner = np.searchsorted(starts, places, side="right") - 1
    size = tiles[owner]
    inside = places - starts[owner]
    job = inside // size
    tile = inside - job * size
    return owner, job, tile, size


def _cuts(starts: Longs, tiles: Longs, total: int, used: int) -> Longs:
    """Places [used + 1] where shares begin and end, rising."""
    cuts = np.arange(used + 1, dtype=np.int64) * total // used
    inner = cuts[1:-1]
    _, _, tile, size = _locate(starts, tiles, inner)
    # Where shares are shorter than a piece may be, jobs that are worth it are cut at multiples of one.
    kept = tile if total >= used * MIN_PIECE else tile // MIN_PIECE * MIN_PIECE
    whole = size < 2 * MIN_PIECE
    to_begin = np.where(whole, 2 * tile < size, kept < MIN_PIECE)
    to_end = np.where(whole, ~to_begin, size - kept < MIN_PIECE)
    moved = np.where(to_begin, 0, np.where(to_end, size, kept))
    inner += moved - tile
    return cuts


def _merges(sequences: Ints, starts: Longs, tiles: Longs, job_starts: Longs, group: int) -> Ints:
    """Jobs in several pieces; `job_starts` says for each state where its job begins in the line, in order."""
    count = len(job_starts)
    if count == 0:
        return np.zeros((0, 8), dtype=np.int32)
    first = np.concatenate([[0], np.flatnonzero(job_starts[1:] != job_starts[:-1]) + 1])
    owner, job, _, _ = _locate(starts, tiles, job_starts[first])
    of = sequences[owner]
    head, row_tile = np.divmod(job, of[:, 7])
    first_packed = row_tile * ROWS
    table = np.zeros((len(first), 8), dtype=np.int32)
    table[:, 0] = of[:, 1]
    table[:, 1] = first_packed
    table[:, 2] = np.minimum(ROWS, of[:, 2] * group - first_packed)
    table[:, 3] = head
    table[:, 4] = first
    table[:-1, 5] = first[1:] - first[:-1]
    table[-1, 5] = count - first[-1]
    table[:, 6] = of[:, 4] > 0
    return table

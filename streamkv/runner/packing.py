"""A step as packed arrays: what the model is asked, and what the backend is told of it. Pure functions of a step and tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamkv.attention import StepTensors
from streamkv.core.step import Step

__all__ = ["Batch", "kept", "pack", "padded"]

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step in arrays.

    Attributes:
        rows, starts, counts: [num_seqs].
        tokens, positions: [num_tokens]; a token may be `PENDING`.
        token_rows: [num_tokens], the row that each token belongs to.
        sampled: [num_sampled], entries that sample; one with drafts comes once for each of its tokens.
        places: [num_sampled], packed rows whose logits are sampled from.
    """

    step_id: int
    rows: _Ints
    starts: _Ints
    counts: _Ints
    tokens: _Ints
    positions: _Ints
    token_rows: _Ints
    sampled: _Ints
    places: _Ints

    @property
    def only_decodes(self) -> bool:
        """Whether every entry has one token and samples."""
        return len(self.tokens) == len(self.rows) == len(self.sampled)


def pack(step: Step, tables: npt.NDArray[np.int32], block_size: int) -> tuple[Batch, StepTensors]:
    """Lay a step out.

    Args:
        tables: [num_rows, blocks_per_row], block tables of all rows.
    """
    rows = np.asarray(step.rows, np.int64)  # [num_seqs]
    starts = np.asarray(step.starts, np.int64)
    counts = np.asarray(step.counts, np.int64)
    query_start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    entry = np.repeat(np.arange(len(rows)), counts)  # [num_tokens], which sequence a token belongs to
    positions = np.arange(len(entry)) - query_start[entry] + starts[entry]  # [num_tokens]
    token_rows = rows[entry]
    blocks = tables[token_rows, positions // block_size].astype(np.int64)
    seq_lens = (starts + counts).astype(np.int32)
    width = -(-int(seq_lens.max()) // block_size)
    tensors = StepTensors(
        query_start=torch.from_numpy(query_start),
        seq_lens=torch.from_numpy(seq_lens),
        block_tables=torch.from_numpy(tables[rows, :width]),
        slots=torch.from_numpy(blocks * block_size + positions % block_size),
    )
    samples = np.asarray(step.samples, np.int64)
    sampled = np.repeat(np.arange(len(rows)), samples)
    # The last `samples` packed rows of each entry: its end, less how many of its own come behind.
    behind = np.cumsum(samples)[sampled] - np.arange(len(sampled))
    batch = Batch(
        step_id=step.id,
        rows=rows,
        starts=starts,
        counts=counts,
        tokens=np.asarray(step.tokens, np.int64),
        positions=positions,
        token_rows=token_rows,
        sampled=sampled,
        places=query_start[1:].astype(np.int64)[sampled] - behind,
    )
    return batch, tensors


def padded(tensors: StepTensors, count: int) -> StepTensors:
    """With `count` sequences of length 0 behind, each of which owns a token that goes nowhere."""
    starts = tensors.query_start
    return StepTensors(
        query_start=torch.cat([starts, starts[-1] + torch.arange(1, count + 1, dtype=torch.int32)]),
        seq_lens=torch.cat([tensors.seq_lens, tensors.seq_lens.new_zeros(count)]),
        block_tables=torch.cat([tensors.block_tables, tensors.block_tables.new_zeros(count, tensors.block_tables.shape[1])]),
        slots=torch.cat([tensors.slots, tensors.slots.new_full((count,), -1)]),
    )


def kept(batch: Batch, ids: list[int]) -> list[bool]:
    """Which of the sampled tokens count: those that stand behind nothing but what was sampled before them, drafts or not."""
    result: list[bool] = []
    for index, (entry, place) in enumerate(zip(batch.sampled.tolist(), batch.places.tolist(), strict=True)):
        first = index == 0 or batch.sampled[index - 1] != entry
        result.append(first or (result[-1] and ids[index - 1] == batch.tokens[place]))
    return result

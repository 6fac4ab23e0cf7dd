"""What rows have said before: penalties on the tokens of prompt and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamkv.runner.transfer import upload
from streamkv.sampling_params import Sampling

__all__ = ["PenaltyBatch", "PenaltyTables", "penalise"]


@dataclass(frozen=True, slots=True)
class PenaltyBatch:
    """Rows of a batch that have penalties. `repetition`, `presence` and `frequency` are float32 [num_penalised, 1].

    Attributes:
        rows: rows of the tables, [num_penalised].
        first: where each row begins in the flattened logits, [num_penalised, 1].
    """

    rows: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


class PenaltyTables:
    """Of each row with penalties its distinct tokens, and how often its output has each.

    Lists rather than counts over the vocabulary: a step touches what a row has said, not what it might say. The tables lie in
    host memory, where sampled tokens arrive; they are made when the first such row comes.
    """

    def __init__(self, num_rows: int, max_len: int, vocab_size: int) -> None:
        self._shape = (num_rows, max(1, min(max_len, vocab_size)))
        self._nowhere = vocab_size
        self._used = np.zeros(num_rows, bool)
        self._factors = np.zeros((num_rows, 3), np.float32)  # repetition, presence, frequency
        self._number = np.zeros(num_rows, np.int64)  # distinct tokens
        self._tokens: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)  # [num_rows, most distinct tokens]
        self._counts: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)

    def admit(self, row: int, sampling: Sampling, tokens: Sequence[int], num_prompt: int) -> None:
        """A request takes over a row; `tokens` are prompt and output so far, a fork's output begins where its family's did."""
        factors = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._used[row] = factors != (1.0, 0.0, 0.0)
        if not self._used[row]:
            return
        if not self._tokens.size:
            self._tokens, self._counts = np.zeros(self._shape, np.int32), np.zeros(self._shape, np.int32)
        self._factors[row] = factors
        ids, which = np.unique(np.asarray(tokens, np.int32), return_inverse=True)
        self._number[row] = len(ids)
        self._tokens[row, : len(ids)] = ids
        self._counts[row, : len(ids)] = np.bincount(which[num_prompt:], minlength=len(ids))

    def remembers(self, row: int) -> bool:
        """Whether the row's history matters."""
        return bool(self._used[row])

    def append(self, rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """One token more for each of the rows."""
        used = self._used[rows]
        rows, tokens = rows[used], tokens[used]
        if not len(rows):
            return
        ids, _ = self._listed(rows)
        same = ids == tokens[:, None]
        known = same.any(axis=1)
        place = np.where(known, same.argmax(axis=1), self._number[rows])
        self._counts[rows, place] = np.where(known, self._counts[rows, place], 0) + 1
        self._tokens[rows, place] = tokens
        self._number[rows] += ~known

    def _listed(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Distinct tokens and their counts, [len(rows), most of these rows]; beyond a row's own the place that no token has."""
        number = self._number[rows]
        width = max(1, int(number.max()))
        own = np.arange(width) < number[:, None]
        return np.where(own, self._tokens[rows, :width], self._nowhere), np.where(own, self._counts[rows, :width], 0)

    def factors(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Penalties of each row, [num_rows, 3], any numbers where nothing is `seen`; None if no row has some."""
        return self._factors[rows] if self._used[rows].any() else None

    def seen(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The lists of the rows that have penalties, one after the other: where each row begins, [num_rows + 1], ids, counts."""
        number = np.where(self._used[rows], self._number[rows], 0)
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(number, out=starts[1:])
        width = int(number.max())
        own = np.arange(width) < number[:, None]
        return starts, self._tokens[rows, :width][own], self._counts[rows, :width][own]

    def batch(self, rows: npt.NDArray[np.int64], width: int, device: torch.device) -> PenaltyBatch | None:
        """What stays as long as the batch has these rows; None if none of them has penalties."""
        places = np.flatnonzero(self._used[rows])
        if not len(places):
            return None
        (factors,) = upload([self._factors[rows[places]]], device)
        return PenaltyBatch(rows[places], places[:, None] * width, factors[:, :1], factors[:, 1:2], factors[:, 2:])

    def apply(self, batch: PenaltyBatch, logits: torch.Tensor) -> None:
        """Change the logits of all tokens that the rows have seen.

        Args:
            logits: [num_rows, width], in place; column `vocab_size` belongs to no token.
        """
        ids, counts = self._listed(batch.rows)
        places, own_counts = upload([batch.first + ids, counts], logits.device)
        flat = logits.view(-1)
        # No place comes twice but the one that no token has, and its -inf stays what it is.
        flat[places] = penalise(flat[places], own_counts, batch)


def penalise(values: torch.Tensor, counts: torch.Tensor, batch: PenaltyBatch) -> torch.Tensor:
    """Logits of seen tokens after repetition, presence and frequency penalty; all [num_penalised, most tokens]."""
    values = torch.where(values < 0, values * batch.repetition, values / batch.repetition)
    return values - batch.presence * (counts > 0) - batch.frequency * counts

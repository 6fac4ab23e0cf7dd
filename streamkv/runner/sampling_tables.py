"""Sampling as the runner sees it: parameters by row, and one call per step for all rows of a batch.

What depends only on which rows are in the batch is worked out once and kept until that changes: on the way from logits to tokens
there is no loop over requests, and a feature that no row uses is not there at all. Torch changes one copy of the logits, in
float32; a backend that samples itself (`streamkv.fused.SamplingOps`) does all but typical-p and lists of log-probabilities.

    tokens, finite = sampler.sample(rows, positions, logits)     on the device; on a GPU nothing here waits for it
    told = sampler.launch_logprobs(rows, logits, tokens)         neither does this, and the logits may then be overwritten
    told.read(bad)                                               waits: to be called where the step's tokens are read
    sampler.append(rows, tokens.tolist())                        history: before the next `sample` of rows that need it

`needs_history(rows)` says whether `sample` reads what `append` writes: a step of other rows can be launched before the tokens of
the step before are known to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.fused import FusedOps, SamplingOps
from streamkv.runner.logits_processor import LogitsProcessor
from streamkv.runner.params import RowParams
from streamkv.runner.sampler import CHUNK, most_probable, num_chunks
from streamkv.runner.sampling_draw import Drawing, drawing_of
from streamkv.runner.sampling_fused import FusedChanges, Parameters, parameters_of
from streamkv.runner.sampling_history import PenaltyBatch, PenaltyTables
from streamkv.runner.sampling_logprobs import PositionLogprobs, launch_logprobs, without_top
from streamkv.runner.sampling_masks import MaskBatch, MaskPlaces, MaskTables
from streamkv.runner.transfer import upload
from streamkv.sampling_params import TokenLogprobs

__all__ = ["LaunchedLogprobs", "RowSampler"]

_Ints = npt.NDArray[np.int64]

_PARAMETERS: Final = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("typical_p", np.float64),
        ("seed", np.int64),
        ("branch", np.int64),
        ("logprobs", np.int64),  # -1 = none
    ]
)


@dataclass(frozen=True, slots=True)
class _TorchBatch:
    """What torch is given of a batch.

    Attributes:
        places: of the masks.
        may_be_empty: masks or processors may leave some row nothing.
    """

    drawing: Drawing
    penalties: PenaltyBatch | None
    masks: MaskBatch | None
    places: MaskPlaces | None
    may_be_empty: bool


@dataclass(frozen=True, slots=True)
class _FusedBatch:
    """What the backend's functions are given of a batch.

    Attributes:
        changes: None if logits are sampled from as they are.
        rest: entries that torch draws all the same, and how.
    """

    parameters: Parameters
    changes: FusedChanges | None
    rest: tuple[torch.Tensor, Drawing] | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """What stays as long as the batch has the same rows. Entries are indices into the batch.

    Attributes:
        processors: each with the entries that asked for it and their rows.
        plain: of each row the largest of its logits is taken, as they are.
        way: how it is sampled otherwise.
    """

    rows: _Ints
    processors: list[tuple[LogitsProcessor, torch.Tensor, _Ints]]
    plain: bool
    way: _TorchBatch | _FusedBatch


@dataclass(frozen=True, slots=True)
class LaunchedLogprobs:
    """Log-probabilities of sampled tokens that nobody has waited for yet.

    Attributes:
        parts: entries of the batch that asked, how many of the most probable tokens each lists, and what they are told.
    """

    parts: list[tuple[_Ints, _Ints, PositionLogprobs]]

    def read(self, skip: AbstractSet[int] = frozenset()) -> dict[int, TokenLogprobs]:
        """By entry, an index into the batch's rows; waits for the device.

        Args:
            skip: entries that are not wanted.
        """
        rows = chain.from_iterable(zip(*(*map(list, part[:2]), part[2].read()), strict=True) for part in self.parts)
        return {int(entry): TokenLogprobs(one.chosen, one.top[:most], one.rank) for entry, most, one in rows if entry not in skip}


class RowSampler:
    """Owns parameters and history of every row. Lives in the runner's one thread."""

    def __init__(
        self,
        *,
        num_rows: int,
        max_len: int,
        vocab_size: int,
        device: torch.device,
        processors: Mapping[str, LogitsProcessor] | None = None,
        ops: FusedOps | None = None,
    ) -> None:
        """Empty tables.

        Args:
            max_len: most tokens of a row, prompt and output.
            ops: the backend's.
            processors: logits processors that requests may ask for, by name, in the order in which they are applied.
        """
        self._vocab_size = vocab_size
        self._max_len = max_len
        self._width = num_chunks(vocab_size) * CHUNK
        self._device = device
        self._ops = ops
        self._sampling: SamplingOps | None = getattr(ops, "sampling", None)
        self._processors = dict(processors or {})
        self._parameters = np.zeros(num_rows, _PARAMETERS)
        self._length = np.zeros(num_rows, np.int64)
        self._remembers = np.zeros(num_rows, bool)  # rows that need their history
        self._penalties = PenaltyTables(num_rows, max_len, vocab_size)
        self._masks = MaskTables(num_rows, max_len, vocab_size)
        self._asked = {name: np.zeros(num_rows, bool) for name in self._processors}  # by processor: rows that use it
        self._batch: _Batch | None = None
        self._logits = torch.empty((0, self._width), device=device)  # private copy, as many rows as were ever sampled at once

    def admit(self, row: int, params: RowParams) -> None:
        """A request takes over a row: a new one, or one that was preempted and comes back with its output."""
        sampling = params.sampling
        self._batch = None
        self._length[row] = len(params.tokens)
        self._parameters[row] = (
            sampling.temperature,
            sampling.top_k if sampling.top_k < self._vocab_size else 0,
            sampling.top_p,
            sampling.min_p,
            sampling.typical_p,
            sampling.seed,
            params.branch,
            -1 if sampling.logprobs is None else sampling.logprobs,
        )
        self._penalties.admit(row, sampling, params.tokens, params.num_asked)
        self._masks.admit(row, sampling, params.tokens, params.num_prompt)
        wanted = dict(sampling.processors)
        for name, asked in self._asked.items():
            asked[row] = name in wanted
            if asked[row]:
                self._processors[name].admit(row, wanted[name], params.tokens, params.num_asked)
        asks = any(asked[row] for asked in self._asked.values())
        self._remembers[row] = asks or self._penalties.remembers(row) or self._masks.remembers(row)

    def append(self, rows: _Ints, tokens: Sequence[int]) -> None:
        """The sampled tokens become part of their rows' history; called once the whole step has succeeded.

        Args:
            rows: [num_rows], each at most once.
            tokens: one per row.
        """
        positions = self._length[rows]
        room = positions < self._max_len  # a row may be sampled once more after its end
        rows, positions, added = rows[room], positions[room], np.asarray(tokens, np.int64)[room]
        self._length[rows] += 1
        self._penalties.append(rows, added)
        self._masks.append(rows, positions, added)
        for name, asked in self._asked.items():
            own = asked[rows]
            if own.any():
                self._processors[name].append(rows[own], added[own])

    def needs_history(self, rows: _Ints) -> bool:
        """Whether what is sampled next for these rows depends on the tokens that were sampled for them before.

        It does by penalties, bad words of several tokens, and processors; not by bias, other masks and `min_tokens`.
        """
        return bool(self._remembers[rows].any())

    @torch.inference_mode()
    def sample(self, rows: _Ints, positions: _Ints, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token per row. Changes no state, and on a GPU waits for nothing unless a processor does.

        Args:
            rows: [n], each at most once.
            positions: [n], of the sampled tokens in their sequences.
            logits: [n, vocab_size], any float dtype; not changed.

        Returns:
            On the device: [n] int64, always a token of the model, and [n] bool, whether all logits are finite. A row where
            they are not gives an arbitrary token; callers drop it. Where masks leave no token, it is the model's most
            probable one.
        """
        batch = self._batch_of(rows)
        if self._ops is not None and logits.dtype is self._ops.dtype and batch.plain:
            return self._ops.most_probable(logits)
        if isinstance(batch.way, _TorchBatch):
            return self._by_torch(batch, batch.way, positions, logits)
        assert self._sampling is not None
        return self._by_backend(batch, batch.way, self._sampling, positions, logits)

    def _by_torch(
        self, batch: _Batch, way: _TorchBatch, positions: _Ints, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        work = self._copy(logits)
        finite = _all_finite(work[:, : self._vocab_size])
        chunked = work.view(len(logits), -1, CHUNK)
        best = most_probable(chunked, chunked.amax(dim=-1)) if way.may_be_empty else None
        if way.penalties is not None:
            self._penalties.apply(way.penalties, work)
        if way.masks is not None and way.places is not None:
            self._masks.apply(way.masks, way.places, work, positions)
        self._process(batch, work[:, : self._vocab_size])
        (where,) = upload([positions], self._device)
        return way.drawing.tokens(work, where, best).clamp_(0, self._vocab_size - 1), finite

    def _by_backend(
        self, batch: _Batch, way: _FusedBatch, ops: SamplingOps, positions: _Ints, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best: torch.Tensor | None = None
        if way.changes is None:
            finite = _all_finite(logits)
            (where,) = upload([positions], self._device)
        else:
            changes, where = way.changes.now(positions)
            logits, best, finite = ops.change(logits, changes)
            self._process(batch, logits)
        tokens = ops.sample(logits, *way.parameters, where, best)
        if way.rest is not None:
            entries, drawing = way.rest
            drawn = drawing.tokens(self._copy(logits[entries]), where[entries], None if best is None else best[entries])
            tokens[entries] = drawn.clamp_(0, self._vocab_size - 1)
        return tokens, finite

    def _copy(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, width] float32, -inf where there is no token; one buffer for all steps: fresh pages cost as much."""
        if len(self._logits) < len(logits):
            self._logits = torch.full((len(logits), self._width), -torch.inf, device=self._device)
        work = self._logits[: len(logits)]
        work[:, : self._vocab_size] = logits
        return work

    @staticmethod
    def _process(batch: _Batch, logits: torch.Tensor) -> None:
        """Let processors change logits, in place."""
        for processor, entries, rows in batch.processors:
            logits[entries] = processor.apply(rows, logits[entries])

    def _batch_of(self, rows: _Ints) -> _Batch:
        batch = self._batch
        if batch is None or not np.array_equal(batch.rows, rows):
            batch = self._batch = self._make_batch(rows)
        return batch

    def _make_batch(self, rows: _Ints) -> _Batch:
        own = self._parameters[rows]
        asked = [(name, np.flatnonzero(asked[rows])) for name, asked in self._asked.items() if asked[rows].any()]
        masks = self._masks.batch(rows)
        changed = bool(asked) or masks is not None or self._penalties.factors(rows) is not None
        return _Batch(
            rows=rows.copy(),
            processors=[(self._processors[name], self._tensor(where), rows[where]) for name, where in asked],
            plain=not changed and not own["temperature"].any(),
            way=self._torch_batch(own, rows, masks, bool(asked))
            if self._sampling is None
            else self._fused_batch(own, rows, masks, changed),
        )

    def _torch_batch(self, own: npt.NDArray[np.void], rows: _Ints, masks: MaskBatch | None, processed: bool) -> _TorchBatch:
        return _TorchBatch(
            drawing=drawing_of(own, self._width, self._tensor),
            penalties=self._penalties.batch(rows, self._width, self._device),
            masks=masks,
            places=None if masks is None else self._masks.places(masks, self._width, self._device),
            may_be_empty=processed or (masks is not None and masks.may_be_empty),
        )

    def _fused_batch(self, own: npt.NDArray[np.void], rows: _Ints, masks: MaskBatch | None, changed: bool) -> _FusedBatch:
        rest = np.flatnonzero((own["typical_p"] < 1) & (own["temperature"] > 0))
        return _FusedBatch(
            parameters=parameters_of(own, self._device),
            changes=FusedChanges(rows.copy(), self._penalties, self._masks, masks, self._device) if changed else None,
            rest=(self._tensor(rest), drawing_of(own[rest], self._width, self._tensor)) if len(rest) else None,
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload([values.copy()], self._device)[0]  # a copy, because columns of records lie at odd strides

    @torch.inference_mode()
    def launch_logprobs(self, rows: _Ints, logits: torch.Tensor, tokens: torch.Tensor) -> LaunchedLogprobs:
        """What rows that asked for log-probabilities are told of the sampled tokens. Waits for nothing on a GPU.

        Args:
            rows: [n].
            logits: [n, vocab_size], any float dtype; not changed, and not needed any more once this has returned.
            tokens: [n], on the device.
        """
        wanted = self._parameters["logprobs"][rows]
        parts = []
        alone = wanted == 0 if self._sampling is not None else np.zeros(len(rows), bool)  # of these the backend tells
        for entries, tell in ((np.flatnonzero(alone), self._tell), (np.flatnonzero((wanted >= 0) & ~alone), launch_logprobs)):
            if len(entries):
                which = slice(None) if len(entries) == len(rows) else self._tensor(entries)
                parts.append((entries, wanted[entries], tell(logits[which], tokens[which], int(wanted[entries].max()))))
        return LaunchedLogprobs(parts)

    def _tell(self, logits: torch.Tensor, tokens: torch.Tensor, _top: int) -> PositionLogprobs:
        assert self._sampling is not None
        return without_top(*self._sampling.token_logprobs(logits, tokens))


def _all_finite(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] bool. One reduction shows NaN and Inf anywhere in a row: a sum of finite ones stays far from float32's limit."""
    return torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))

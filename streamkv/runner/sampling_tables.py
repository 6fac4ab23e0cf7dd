"""Sampling as the runner sees it: parameters by row, and one call per step for all rows of a batch.

What depends only on which rows are in the batch is worked out once and kept until that changes: on the way from logits to tokens
there is no loop over requests, and a feature that no row uses is not there at all. The logits are copied once, to float32, and
changed in place.

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
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.fused import FusedOps
from streamkv.runner.logits_processor import LogitsProcessor
from streamkv.runner.params import RowParams
from streamkv.runner.philox import uniform
from streamkv.runner.sampler import CHUNK, draw, inverse_cdf, most_probable, num_chunks, softmax
from streamkv.runner.sampling_cuts import Cuts
from streamkv.runner.sampling_history import PenaltyBatch, PenaltyTables
from streamkv.runner.sampling_logprobs import PositionLogprobs, launch_logprobs
from streamkv.runner.sampling_masks import MaskBatch, MaskTables
from streamkv.sampling_params import TokenLogprobs

__all__ = ["LaunchedLogprobs", "RowSampler"]

_Ints = npt.NDArray[np.int64]

_COLDEST: Final = 1e-30
"""Division by less could overflow; long before, only the most probable token has any weight."""

_SLICE: Final = 2**21
"""Logits of the rows that are drawn together. What is needed on the way is as large in float32, and beyond some 32 MiB the
allocator hands out fresh pages every time, which cost more than the work."""

_Entries = slice | torch.Tensor
"""Some entries of a batch: a slice where they stand together, so that picking them copies nothing."""

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
class _Batch:
    """What stays as long as the batch has the same rows. Entries are indices into the batch.

    Attributes:
        temperature: float32 [num_rows, 1], 1 for greedy rows; None = all 1.
        plain: entries that draw from all tokens, in slices.
        cut: entries that draw from what their cuts keep, in slices; the others take the most probable token.
        seed, branch: int64 [num_rows].
        processors: each with the entries that asked for it and their rows.
        may_be_empty: masks or processors may leave some row nothing.
    """

    rows: _Ints
    temperature: torch.Tensor | None
    plain: list[_Entries]
    cut: list[tuple[_Entries, Cuts]]
    seed: torch.Tensor
    branch: torch.Tensor
    penalties: PenaltyBatch | None
    masks: MaskBatch | None
    processors: list[tuple[LogitsProcessor, torch.Tensor, _Ints]]
    may_be_empty: bool

    @property
    def takes_the_most_probable(self) -> bool:
        """Of each row the largest of its logits as they are."""
        return not (self.plain or self.cut or self.penalties or self.masks or self.processors)


@dataclass(frozen=True, slots=True)
class LaunchedLogprobs:
    """Log-probabilities of sampled tokens that nobody has waited for yet.

    Attributes:
        entries: [n], the entries of the batch that asked.
        wanted: [n], how many of the most probable tokens each lists.
        told: None if there is no such entry.
    """

    entries: _Ints
    wanted: _Ints
    told: PositionLogprobs | None

    def read(self, skip: AbstractSet[int] = frozenset()) -> dict[int, TokenLogprobs]:
        """By entry, an index into the batch's rows; waits for the device.

        Args:
            skip: entries that are not wanted.
        """
        if self.told is None:
            return {}
        rows = zip(self.entries.tolist(), self.wanted.tolist(), self.told.read(), strict=True)
        return {entry: TokenLogprobs(one.chosen, one.top[:most], one.rank) for entry, most, one in rows if entry not in skip}


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
        if self._ops is not None and logits.dtype is self._ops.dtype and batch.takes_the_most_probable:
            return self._ops.most_probable(logits)
        # One reduction shows NaN and Inf anywhere in a row: a sum of finite logits stays far from float32's limit.
        finite = torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))
        return self._sample(batch, positions, logits), finite

    def _sample(self, batch: _Batch, positions: _Ints, logits: torch.Tensor) -> torch.Tensor:
        work = self._copy(logits)
        chunked = work.view(len(logits), -1, CHUNK)
        best = most_probable(chunked, chunked.amax(dim=-1)) if batch.may_be_empty else None
        self._change(batch, work, positions)
        maxima = chunked.amax(dim=-1)
        empty = maxima.amax(dim=-1) == -torch.inf
        if batch.temperature is not None:
            work.div_(batch.temperature)
            maxima.div_(batch.temperature)  # rounded alike, so they still are the maxima
        tokens = most_probable(chunked, maxima)
        if batch.plain or batch.cut:
            uniforms = uniform(batch.seed, batch.branch, torch.from_numpy(positions).to(self._device))
            for some in batch.plain:
                tokens[some] = inverse_cdf(softmax(chunked[some]), uniforms[some])
            for some, cuts in batch.cut:
                tokens[some] = draw(chunked[some], maxima[some], cuts, uniforms[some])
        if best is not None:
            tokens = torch.where(empty, best, tokens)
        return tokens.clamp_(0, self._vocab_size - 1)

    def _copy(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, width] float32, -inf where there is no token; one buffer for all steps: fresh pages cost as much."""
        if len(self._logits) < len(logits):
            self._logits = torch.full((len(logits), self._width), -torch.inf, device=self._device)
        work = self._logits[: len(logits)]
        work[:, : self._vocab_size] = logits
        return work

    def _change(self, batch: _Batch, work: torch.Tensor, positions: _Ints) -> None:
        """Penalties, bias, masks and processors, in place."""
        if batch.penalties is not None:
            self._penalties.apply(batch.penalties, work)
        if batch.masks is not None:
            self._masks.apply(batch.masks, work, positions)
        tokens = work[:, : self._vocab_size]
        for processor, entries, rows in batch.processors:
            tokens[entries] = processor.apply(rows, tokens[entries])

    def _batch_of(self, rows: _Ints) -> _Batch:
        batch = self._batch
        if batch is None or not np.array_equal(batch.rows, rows):
            batch = self._batch = self._make_batch(rows)
        return batch

    def _make_batch(self, rows: _Ints) -> _Batch:
        own = self._parameters[rows]
        greedy = own["temperature"] == 0
        temperature = np.where(greedy, 1.0, np.maximum(own["temperature"], _COLDEST)).astype(np.float32)
        cut = (own["top_k"] > 0) | (own["top_p"] < 1) | (own["min_p"] > 0) | (own["typical_p"] < 1)
        masks = self._masks.batch(rows, self._width, self._device)
        processors = [(name, np.flatnonzero(asked[rows])) for name, asked in self._asked.items() if asked[rows].any()]
        return _Batch(
            rows=rows.copy(),
            temperature=self._tensor(temperature)[:, None] if (temperature != 1).any() else None,
            plain=[self._entries(some) for some in self._slices(~cut & ~greedy)],
            cut=[(self._entries(some), self._cuts(own[some])) for some in self._slices(cut & ~greedy)],
            seed=self._tensor(own["seed"]),
            branch=self._tensor(own["branch"]),
            penalties=self._penalties.batch(rows, self._width, self._device),
            masks=masks,
            processors=[(self._processors[name], self._tensor(where), rows[where]) for name, where in processors],
            may_be_empty=bool(processors) or (masks is not None and masks.may_be_empty),
        )

    def _slices(self, chosen: npt.NDArray[np.bool_]) -> list[_Ints]:
        """Indices of the chosen entries, a few rows at a time."""
        entries, size = np.flatnonzero(chosen), max(1, _SLICE // self._width)
        return [entries[start : start + size] for start in range(0, len(entries), size)]

    def _entries(self, some: _Ints) -> _Entries:
        first, last = int(some[0]), int(some[-1])
        return slice(first, last + 1) if last - first + 1 == len(some) else self._tensor(some)

    def _cuts(self, own: npt.NDArray[np.void]) -> Cuts:
        by_mass = (own["top_p"] < 1) | (own["typical_p"] < 1)
        return Cuts(
            top_k=self._tensor(own["top_k"]),
            top_p=self._tensor(own["top_p"]),
            min_p=self._tensor(own["min_p"]),
            typical_p=self._tensor(own["typical_p"]),
            by_mass=bool(by_mass.any()),
            typical=bool((own["typical_p"] < 1).any()),
            wide=bool((by_mass & (own["top_k"] == 0)).any()),
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values.copy()).to(self._device)  # a copy, because columns of records may lie at odd strides

    @torch.inference_mode()
    def launch_logprobs(self, rows: _Ints, logits: torch.Tensor, tokens: torch.Tensor) -> LaunchedLogprobs:
        """What rows that asked for log-probabilities are told of the sampled tokens. Waits for nothing on a GPU.

        Args:
            rows: [n].
            logits: [n, vocab_size], any float dtype; not changed, and not needed any more once this has returned.
            tokens: [n], on the device.
        """
        wanted = self._parameters["logprobs"][rows]
        entries = np.flatnonzero(wanted >= 0)
        if not len(entries):
            return LaunchedLogprobs(entries, entries, None)
        if len(entries) < len(rows):
            chosen = self._tensor(entries)
            logits, tokens = logits[chosen], tokens[chosen]
        return LaunchedLogprobs(entries, wanted[entries], launch_logprobs(logits, tokens, int(wanted[entries].max())))

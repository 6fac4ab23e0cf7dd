"""What rows may not say: bias, allowed and bad token ids, bad words, endings before `min_tokens`.

All are short lists of token ids, made when a request is admitted and joined when the batch changes; a step touches the listed
logits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.sampling_params import Sampling

__all__ = ["MaskBatch", "MaskTables"]

_Ints = npt.NDArray[np.int64]

_ANY: Final = -1
"""In a bad word that is shorter than others: whatever was there."""


@dataclass(frozen=True, slots=True)
class _Lists:
    """Of one row. A bad word of several tokens is its last one and those before it, the nearest first."""

    bias: tuple[tuple[int, float], ...]
    allowed: tuple[int, ...] | None
    bad: tuple[int, ...]
    endings: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]

    def may_leave_nothing(self, vocab_size: int) -> bool:
        """Whether as many tokens as may be said can be forbidden at once."""
        number = vocab_size if self.allowed is None else len(set(self.allowed))
        return len(self.bad) + len(self.endings) + len(self.words) >= number


@dataclass(slots=True)
class MaskBatch:
    """The joined lists of a batch. Places are indices into its flattened logits; `of` is the entry each belongs to.

    Attributes:
        bias: places, and what is added to them.
        allowed: entries that have some, and the places that keep their logits.
        bad: places.
        endings, endings_of: places that count until `min_tokens`, which is [num_rows].
        words, words_of: last tokens of bad words.
        before: [num_words, longest], the tokens before them, the nearest first; `_ANY` fills.
        may_be_empty: some row may be left nothing.
    """

    rows: _Ints
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    allowed: tuple[torch.Tensor, torch.Tensor] | None = None
    bad: torch.Tensor | None = None
    endings: _Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    endings_of: _Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    words: _Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    words_of: _Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    before: _Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    may_be_empty: bool = False


class MaskTables:
    """Owns the lists of all rows, and the tokens of those that have bad words of several tokens."""

    def __init__(self, num_rows: int, max_len: int, vocab_size: int) -> None:
        self._shape = (num_rows, max_len)
        self._vocab_size = vocab_size
        self._lists: dict[int, _Lists] = {}
        self._first_ending = np.zeros(num_rows, np.int64)  # position from which on an ending may be sampled
        self._tokens: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)  # [num_rows, max_len] once it is needed

    def admit(self, row: int, sampling: Sampling, tokens: Sequence[int], num_prompt: int) -> None:
        """A request takes over a row; ids that the model does not have cannot be sampled anyway and are left out."""
        size = self._vocab_size
        words = tuple(word for word in sampling.bad_words if max(word) < size)
        lists = _Lists(
            bias=tuple(pair for pair in sampling.logit_bias if pair[0] < size),
            allowed=tuple(token for token in sampling.allowed_token_ids if token < size) if sampling.allowed_token_ids else None,
            bad=tuple(word[0] for word in words if len(word) == 1),
            endings=tuple(token for token in sampling.stop_token_ids if token < size) if sampling.min_tokens else (),
            words=tuple(word[::-1] for word in words if len(word) > 1),
        )
        self._first_ending[row] = num_prompt + sampling.min_tokens
        self._lists.pop(row, None)
        if lists != _NOTHING:
            self._lists[row] = lists
        if lists.words:
            if not self._tokens.size:
                self._tokens = np.zeros(self._shape, np.int32)
            self._tokens[row, : len(tokens)] = tokens

    def remembers(self, row: int) -> bool:
        """Whether the row's history matters."""
        return row in self._lists and bool(self._lists[row].words)

    def append(self, rows: _Ints, positions: _Ints, tokens: _Ints) -> None:
        """One token more for each of the rows."""
        if self._tokens.size:
            self._tokens[rows, positions] = tokens

    def batch(self, rows: _Ints, width: int, device: torch.device) -> MaskBatch | None:
        """What stays as long as the batch has these rows; None if nothing is to be done.

        Args:
            width: of a row of the logits.
        """
        lists = [(entry, self._lists[row]) for entry, row in enumerate(rows.tolist()) if row in self._lists]
        if not lists:
            return None
        batch = MaskBatch(rows, may_be_empty=any(own.may_leave_nothing(self._vocab_size) for _, own in lists))
        if any(own.bias for _, own in lists):
            places, _ = _join([(entry, [token for token, _ in own.bias]) for entry, own in lists], width)
            values = [value for _, own in lists for _, value in own.bias]
            batch.bias = torch.from_numpy(places).to(device), torch.tensor(values, dtype=torch.float32, device=device)
        allowed = [(entry, own.allowed) for entry, own in lists if own.allowed is not None]
        if allowed:
            entries = torch.tensor([entry for entry, _ in allowed], device=device)
            batch.allowed = entries, torch.from_numpy(_join(allowed, width)[0]).to(device)
        if any(own.bad for _, own in lists):
            batch.bad = torch.from_numpy(_join([(entry, own.bad) for entry, own in lists], width)[0]).to(device)
        batch.endings, batch.endings_of = _join([(entry, own.endings) for entry, own in lists], width)
        batch.words, batch.words_of = _join([(entry, [word[0] for word in own.words]) for entry, own in lists], width)
        words = [word[1:] for _, own in lists for word in own.words]
        longest = max(map(len, words), default=0)
        batch.before = np.array([word + (_ANY,) * (longest - len(word)) for word in words], np.int64).reshape(len(words), longest)
        return batch

    def apply(self, batch: MaskBatch, logits: torch.Tensor, positions: _Ints) -> None:
        """Add the bias, then set what may not be sampled to -inf.

        Args:
            logits: [num_rows, width], in place.
            positions: [num_rows], of the tokens to sample.
        """
        flat = logits.view(-1)
        if batch.bias is not None:
            flat.index_add_(0, *batch.bias)
        if batch.allowed is not None:
            entries, places = batch.allowed
            kept = flat[places]
            logits.index_fill_(0, entries, -torch.inf)
            flat[places] = kept
        if batch.bad is not None:
            flat.index_fill_(0, batch.bad, -torch.inf)
        early = positions < self._first_ending[batch.rows]
        masked = [batch.endings[early[batch.endings_of]]] if early.any() else []
        if len(batch.words):
            masked.append(batch.words[self._completes(batch, positions)])
        for masked_places in masked:
            flat.index_fill_(0, torch.from_numpy(masked_places).to(flat.device), -torch.inf)

    def _completes(self, batch: MaskBatch, positions: _Ints) -> _Ints:
        """Indices of the bad words whose other tokens are the last ones of their rows."""
        found = np.arange(len(batch.words))
        for back in range(batch.before.shape[1]):  # few words are left after the first look
            entries = batch.words_of[found]
            where = positions[entries] - 1 - back
            wanted = batch.before[found, back]
            said = self._tokens[batch.rows[entries], np.clip(where, 0, self._tokens.shape[1] - 1)]
            found = found[(wanted == _ANY) | ((wanted == said) & (where >= 0))]
        return found


_NOTHING: Final = _Lists((), None, (), (), ())


def _join(lists: Sequence[tuple[int, Sequence[int]]], width: int) -> tuple[_Ints, _Ints]:
    """Places in the flattened logits of (entry, token ids), and the entry of each."""
    lengths = [len(ids) for _, ids in lists]
    entries = np.repeat(np.array([entry for entry, _ in lists], np.int64), lengths)
    ids = np.fromiter(chain.from_iterable(ids for _, ids in lists), np.int64, sum(lengths))
    return entries * width + ids, entries

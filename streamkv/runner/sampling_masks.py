"""What rows may not say: bias, allowed and bad token ids, bad words, endings before `min_tokens`.

All are short lists of token ids, made when a request is admitted and joined when the batch changes; a step touches the listed
logits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.runner.transfer import upload
from streamkv.sampling_params import Sampling

__all__ = ["Listed", "MaskBatch", "MaskPlaces", "MaskTables"]

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


@dataclass(frozen=True, slots=True)
class Listed:
    """Token ids of a batch's rows, one row after the other; `of` is the entry that each belongs to."""

    ids: _Ints
    of: _Ints

    def take(self, which: npt.NDArray[np.generic]) -> Listed:
        """Some of them."""
        return Listed(self.ids[which], self.of[which])

    def places(self, width: int) -> _Ints:
        """Their indices in flattened logits with rows of this width."""
        return self.of * width + self.ids


@dataclass(frozen=True, slots=True)
class MaskBatch:
    """The joined lists of a batch.

    Attributes:
        bias: ids, with what is added to each, float32.
        restricted: entries that may say nothing but what is `allowed`.
        endings: count until `min_tokens`.
        words: last tokens of bad words.
        before: [num_words, longest], the tokens before them, the nearest first; `_ANY` fills.
        may_be_empty: some row may be left nothing.
    """

    rows: _Ints
    bias: Listed
    bias_values: npt.NDArray[np.float32]
    restricted: _Ints
    allowed: Listed
    bad: Listed
    endings: Listed
    words: Listed
    before: _Ints
    may_be_empty: bool


@dataclass(frozen=True, slots=True)
class MaskPlaces:
    """Where the lists of a batch lie in torch's flattened logits; `restricted` are rows of these."""

    bias: torch.Tensor
    bias_values: torch.Tensor
    restricted: torch.Tensor
    allowed: torch.Tensor
    bad: torch.Tensor


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

    def batch(self, rows: _Ints) -> MaskBatch | None:
        """What stays as long as the batch has these rows; None if nothing is to be done."""
        lists = [(entry, self._lists[row]) for entry, row in enumerate(rows.tolist()) if row in self._lists]
        if not lists:
            return None
        allowed = [(entry, own.allowed) for entry, own in lists if own.allowed is not None]
        words = [word[1:] for _, own in lists for word in own.words]
        longest = max(map(len, words), default=0)
        return MaskBatch(
            rows=rows.copy(),
            bias=_join([(entry, [token for token, _ in own.bias]) for entry, own in lists]),
            bias_values=np.array([value for _, own in lists for _, value in own.bias], np.float32),
            restricted=np.array([entry for entry, _ in allowed], np.int64),
            allowed=_join(allowed),
            bad=_join([(entry, own.bad) for entry, own in lists]),
            endings=_join([(entry, own.endings) for entry, own in lists]),
            words=_join([(entry, [word[0] for word in own.words]) for entry, own in lists]),
            before=np.array([word + (_ANY,) * (longest - len(word)) for word in words], np.int64).reshape(len(words), longest),
            may_be_empty=any(own.may_leave_nothing(self._vocab_size) for _, own in lists),
        )

    def places(self, batch: MaskBatch, width: int, device: torch.device) -> MaskPlaces:
        """Those of logits with rows of this width."""
        listed = [batch.bias.places(width), batch.restricted, batch.allowed.places(width), batch.bad.places(width)]
        bias, restricted, allowed, bad = upload(listed, device)
        return MaskPlaces(bias, upload([batch.bias_values], device)[0], restricted, allowed, bad)

    def apply(self, batch: MaskBatch, places: MaskPlaces, logits: torch.Tensor, positions: _Ints) -> None:
        """Add the bias, then set what may not be sampled to -inf.

        Args:
            logits: [num_rows, width], in place.
            positions: [num_rows], of the tokens to sample.
        """
        flat = logits.view(-1)
        if len(places.bias):
            flat.index_add_(0, places.bias, places.bias_values)
        if len(places.restricted):
            kept = flat[places.allowed]
            logits.index_fill_(0, places.restricted, -torch.inf)
            flat[places.allowed] = kept
        if len(places.bad):
            flat.index_fill_(0, places.bad, -torch.inf)
        for part in self.for_now(batch, positions):
            flat.index_fill_(0, upload([part.places(logits.shape[1])], flat.device)[0], -torch.inf)

    def for_now(self, batch: MaskBatch, positions: _Ints) -> list[Listed]:
        """What may not be said at these positions, beside what is bad or not allowed."""
        parts: list[Listed] = []
        early = positions < self._first_ending[batch.rows]
        if early.any():
            parts.append(batch.endings.take(early[batch.endings.of]))
        if len(batch.words.ids):
            parts.append(batch.words.take(self._completes(batch, positions)))
        return [part for part in parts if len(part.ids)]

    def bits(self, batch: MaskBatch) -> npt.NDArray[np.int32]:
        """What rows may say, [num_rows, words]: bit t % 32 of word t / 32."""
        words = -(-self._vocab_size // 32)
        may = np.zeros((len(batch.restricted), words * 32), np.uint8)
        may[np.searchsorted(batch.restricted, batch.allowed.of), batch.allowed.ids] = 1
        bits = np.full((len(batch.rows), words), -1, np.int32)
        bits[batch.restricted] = np.packbits(may, axis=1, bitorder="little").view(np.int32)
        return bits

    def _completes(self, batch: MaskBatch, positions: _Ints) -> _Ints:
        """Indices of the bad words whose other tokens are the last ones of their rows."""
        found = np.arange(len(batch.words.ids))
        for back in range(batch.before.shape[1]):  # few words are left after the first look
            entries = batch.words.of[found]
            where = positions[entries] - 1 - back
            wanted = batch.before[found, back]
            said = self._tokens[batch.rows[entries], np.clip(where, 0, self._tokens.shape[1] - 1)]
            found = found[(wanted == _ANY) | ((wanted == said) & (where >= 0))]
        return found


_NOTHING: Final = _Lists((), None, (), (), ())


def _join(lists: Sequence[tuple[int, Sequence[int]]]) -> Listed:
    """The token ids of (entry, token ids)."""
    lengths = [len(ids) for _, ids in lists]
    entries = np.repeat(np.array([entry for entry, _ in lists], np.int64), lengths)
    return Listed(np.fromiter(chain.from_iterable(ids for _, ids in lists), np.int64, sum(lengths)), entries)

"""Drawing tokens by torch: what stays as long as a batch has the same rows, and the way from changed logits to tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.runner.philox import uniform
from streamkv.runner.sampler import CHUNK, draw, inverse_cdf, most_probable, softmax
from streamkv.runner.sampling_cuts import Cuts

__all__ = ["COLDEST", "Drawing", "drawing_of"]

COLDEST: Final = 1e-30
"""Division by less could overflow; long before, only the most probable token has any weight."""

_SLICE: Final = 2**21
"""Logits of the rows that are drawn together. What is needed on the way is as large in float32, and beyond some 32 MiB the
allocator hands out fresh pages every time, which cost more than the work."""

_Ints = npt.NDArray[np.int64]
_Entries = slice | torch.Tensor
"""Some entries of a batch: a slice where they stand together, so that picking them copies nothing."""

_Upload = Callable[[npt.NDArray[np.generic]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Drawing:
    """How some rows are drawn. Entries are indices into these.

    Attributes:
        temperature: float32 [num_rows, 1], 1 for greedy rows; None = all 1.
        plain: entries that draw from all tokens, in slices.
        cut: entries that draw from what their cuts keep, in slices; the others take the most probable token.
        seed, branch: int64 [num_rows].
    """

    temperature: torch.Tensor | None
    plain: list[_Entries]
    cut: list[tuple[_Entries, Cuts]]
    seed: torch.Tensor
    branch: torch.Tensor

    @property
    def greedy(self) -> bool:
        """All rows take the most probable token."""
        return not (self.plain or self.cut)

    def tokens(self, work: torch.Tensor, positions: torch.Tensor, fallback: torch.Tensor | None) -> torch.Tensor:
        """One token per row.

        Args:
            work: [num_rows, whole chunks] float32, -inf where there is no token; overwritten.
            positions: [num_rows] int64, of the tokens in their sequences.
            fallback: [num_rows] int64, for rows whose logits are all -inf; None = there is none.

        Returns:
            [num_rows] int64. A row with NaN or +inf gives an arbitrary one, which may be a place that no token has.
        """
        chunked = work.view(len(work), -1, CHUNK)
        maxima = chunked.amax(dim=-1)
        empty = maxima.amax(dim=-1) == -torch.inf
        if self.temperature is not None:
            work.div_(self.temperature)
            maxima.div_(self.temperature)  # rounded alike, so they still are the maxima
        tokens = most_probable(chunked, maxima)
        if not self.greedy:
            uniforms = uniform(self.seed, self.branch, positions)
            for some in self.plain:
                tokens[some] = inverse_cdf(softmax(chunked[some]), uniforms[some])
            for some, cuts in self.cut:
                tokens[some] = draw(chunked[some], maxima[some], cuts, uniforms[some])
        return tokens if fallback is None else torch.where(empty, fallback, tokens)


def drawing_of(own: npt.NDArray[np.void], width: int, upload: _Upload) -> Drawing:
    """How the rows with these parameters are drawn.

    Args:
        own: [num_rows], as `RowSampler` keeps them.
        width: of a row of the logits.
        upload: to the device.
    """
    greedy = own["temperature"] == 0
    temperature = np.where(greedy, 1.0, np.maximum(own["temperature"], COLDEST)).astype(np.float32)
    cut = (own["top_k"] > 0) | (own["top_p"] < 1) | (own["min_p"] > 0) | (own["typical_p"] < 1)
    return Drawing(
        temperature=upload(temperature)[:, None] if (temperature != 1).any() else None,
        plain=[_entries(some, upload) for some in _slices(~cut & ~greedy, width)],
        cut=[(_entries(some, upload), _cuts(own[some], upload)) for some in _slices(cut & ~greedy, width)],
        seed=upload(own["seed"]),
        branch=upload(own["branch"]),
    )


def _slices(chosen: npt.NDArray[np.bool_], width: int) -> list[_Ints]:
    """Indices of the chosen entries, a few rows at a time."""
    entries, size = np.flatnonzero(chosen), max(1, _SLICE // width)
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _entries(some: _Ints, upload: _Upload) -> _Entries:
    first, last = int(some[0]), int(some[-1])
    return slice(first, last + 1) if last - first + 1 == len(some) else upload(some)


def _cuts(own: npt.NDArray[np.void], upload: _Upload) -> Cuts:
    by_mass = (own["top_p"] < 1) | (own["typical_p"] < 1)
    return Cuts(
        top_k=upload(own["top_k"]),
        top_p=upload(own["top_p"]),
        min_p=upload(own["min_p"]),
        typical_p=upload(own["typical_p"]),
        by_mass=bool(by_mass.any()),
        typical=bool((own["typical_p"] < 1).any()),
        wide=bool((by_mass & (own["top_k"] == 0)).any()),
    )

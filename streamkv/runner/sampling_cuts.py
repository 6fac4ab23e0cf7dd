"""Which logits are kept: top-k, top-p, min-p and typical-p as two numbers per row.

The kept set of a row is an interval of its logits: top-k, top-p and min-p cut from below, and typical-p keeps what is within a
distance of the expected surprise. Logits that equal an end of the interval are kept, all of them. The ends are looked for among
the largest few logits of a row, and only where these do not tell is the row sorted; on a GPU, which would have to be asked
whether they do, all rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

__all__ = ["LISTED", "Cuts", "looking_is_free", "pick", "thresholds"]

LISTED: Final = 64
"""Logits per row among which the cuts are looked for first."""

_MORE: Final = 1024
"""Logits per row among which they are looked for next; then the whole row is sorted."""

_SORTED: Final = 2**17
"""Logits that are looked at together from then on: temporaries stay near the processor."""

_NEGLIGIBLE: Final = -200.0
"""A logit this far below the largest has no weight in float32; -inf times 0 would be no number."""


def looking_is_free(device: torch.device) -> bool:
    """Whether the host may look at numbers on the device: a GPU would first have to finish all that is queued."""
    return device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Cuts:
    """The cuts of some rows, in the order in which they are applied; all tensors [num_rows].

    Attributes:
        top_k: int64, at most the vocabulary's size; 0 = all.
        top_p, min_p, typical_p: float64; 1, 0 and 1 = all.
        by_mass: some row has a top-p or a typical-p.
        typical: some row has a typical-p.
        wide: some row has one of the two without a top-k.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    by_mass: bool
    typical: bool
    wide: bool

    def of(self, rows: torch.Tensor) -> Cuts:
        """Those of some rows, given by their indices."""
        parts = (self.top_k[rows], self.top_p[rows], self.min_p[rows], self.typical_p[rows])
        return Cuts(*parts, self.by_mass, self.typical, self.wide)


def thresholds(
    logits: torch.Tensor, candidates: torch.Tensor, cuts: Cuts, probabilities: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest kept logit per row.

    Args:
        logits: [num_rows, num_chunks, chunk] float32, divided by the temperature, -inf where there is no token.
        candidates: [num_rows, few]; the `LISTED` largest logits of each row are among them.
        probabilities: softmax of the logits, if `cuts.wide`.

    Returns:
        Two of [num_rows] float32; -inf and +inf where nothing is cut.
    """
    width = logits[0].numel()
    if not looking_is_free(logits.device):
        low, high, _ = _cut(_Listing(_largest(logits.flatten(1), width), width, None), cuts)
        return low, high
    totals = None if probabilities is None else _totals(logits, probabilities, cuts)
    low, high, known = _cut(_Listing(_largest(candidates, LISTED), width, totals), cuts)
    for count in (_MORE, width):
        for rows in torch.split((~known).nonzero().flatten(), _SORTED // min(count, _SORTED)):
            listing = _Listing(_largest(pick(logits, rows).flatten(1), count), width, totals and totals.of(rows))
            low[rows], high[rows], known[rows] = _cut(listing, cuts.of(rows))
    return low, high


def pick(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows, in ascending order; not a copy if these are all."""
    return values if len(rows) == len(values) else values[rows]


def _cut(listing: _Listing, cuts: Cuts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[num_rows] each: smallest kept logit, largest kept logit, and whether the listed logits were enough to tell."""
    listing.top_k(cuts.top_k[:, None])
    if cuts.by_mass:
        listing.top_p(cuts.top_p[:, None])
    listing.min_p(cuts.min_p[:, None])
    if cuts.typical:
        listing.typical_p(cuts.typical_p[:, None])
    return listing.low[:, 0], listing.high[:, 0], listing.known[:, 0]


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """[num_rows, at most count], descending."""
    count = min(count, values.shape[-1])
    if looking_is_free(values.device):
        # numpy sorts and partitions with vector instructions: a seventh of torch's time.
        found = values.numpy()
        if count < values.shape[-1]:
            found = np.partition(found, -count, axis=-1)[:, -count:]
        return torch.from_numpy(np.sort(found, axis=-1)).flip(-1)
    return values.topk(count, dim=-1).values


def _ascending(values: torch.Tensor) -> torch.Tensor:
    """Indices in ascending order of the values."""
    if looking_is_free(values.device):
        return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    return values.argsort(dim=-1)


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over whole rows, [num_rows, 1] float64, in weights exp(x - largest x).

    Attributes:
        mass: of the weights.
        mean: of x - largest x under the distribution; NaN if no row has a typical-p.
    """

    mass: torch.Tensor
    mean: torch.Tensor

    def of(self, rows: torch.Tensor) -> _Totals:
        """Those of some rows, given by their indices."""
        return _Totals(self.mass[rows], self.mean[rows])


def _totals(logits: torch.Tensor, probabilities: torch.Tensor, cuts: Cuts) -> _Totals:
    mass = _sum(probabilities) / probabilities.amax(dim=(1, 2))
    if not cuts.typical:
        return _Totals(mass[:, None], torch.full_like(mass[:, None], torch.nan))
    below = (logits - logits.amax(dim=(1, 2), keepdim=True)).clamp_(min=_NEGLIGIBLE)
    return _Totals(mass[:, None], _sum(below.mul_(probabilities))[:, None])


def _sum(values: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_chunks, chunk] float32 to [num_rows] float64; in float32 within a chunk only."""
    return values.sum(dim=-1).double().sum(dim=-1)


class _Listing:
    """The largest logits of each row, and what is kept so far. All tensors are [num_rows, count], or [num_rows, 1] about the row.

    Attributes:
        values: float32, descending.
        below: values - largest value.
        weights: float64, exp(below).
        low, high: smallest and largest kept logit.
        known: False where the listed logits do not tell them.
    """

    def __init__(self, values: torch.Tensor, width: int, totals: _Totals | None) -> None:
        """Nothing is cut yet.

        Args:
            width: logits of a whole row.
            totals: None if no row cuts by mass before it has a top-k.
        """
        self.values = values
        self.below = values - values[:, :1]
        self.weights = self.below.exp().double()
        self.low = torch.full_like(values[:, :1], -torch.inf)
        self.high = torch.full_like(self.low, torch.inf)
        self.known = torch.ones_like(self.low, dtype=torch.bool)
        self._complete = values.shape[-1] == width
        self._totals = totals

    def _uncut(self) -> torch.Tensor:
        return self.low == -torch.inf

    def _listed(self) -> torch.Tensor:
        """True where all that is kept is among these logits."""
        return torch.ones_like(self.known) if self._complete else self.values[:, -1:] < self.low

    def top_k(self, k: torch.Tensor) -> None:
        """Keep the k largest; 0 = all."""
        count = self.values.shape[-1]
        smallest = self.values.gather(1, (k - 1).clamp(0, count - 1))
        self.low = torch.where(k > 0, smallest, self.low)
        self.known &= k <= count

    def top_p(self, p: torch.Tensor) -> None:
        """Keep the fewest of the most probable whose probability reaches p; 1 = all."""
        listed = self._listed()
        kept = self.values >= self.low
        weights = self.weights * kept
        mass = weights.sum(dim=-1, keepdim=True)
        if self._totals is not None:
            mass = torch.where(listed, mass, self._totals.mass)
        before = weights.cumsum(dim=-1) - weights  # of everything more probable
        number = (kept & (before < p * mass)).sum(dim=-1, keepdim=True).clamp(min=1)
        told = listed | (self._uncut() & (number < self.values.shape[-1]))
        self.known &= told | (p >= 1)
        self.low = torch.where(p < 1, self.values.gather(1, number - 1), self.low)

    def min_p(self, p: torch.Tensor) -> None:
        """Keep what is at least p times as probable as the most probable one; 0 = all."""
        self.low = torch.maximum(self.low, (self.values[:, :1] + p.log()).float())

    def typical_p(self, p: torch.Tensor) -> None:
        """Keep those whose surprise is nearest to the expected one until their probability reaches p; 1 = all."""
        listed = self._listed()
        kept = self.values >= self.low
        weights = self.weights * kept
        mass = weights.sum(dim=-1, keepdim=True)
        # The surprise -log(probability) minus the expected one is `mean - below`: the normaliser falls out.
        mean = (weights * self.below.clamp(min=_NEGLIGIBLE)).sum(dim=-1, keepdim=True) / mass
        if self._totals is not None:
            mass = torch.where(listed, mass, self._totals.mass)
            mean = torch.where(listed, mean, self._totals.mean)
        distance = torch.where(kept, (self.below - mean).abs(), torch.inf)
        order = _ascending(distance)
        short = (weights.gather(1, order).cumsum(dim=-1) < p * mass).sum(dim=-1, keepdim=True)
        number = torch.minimum(short, kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        reach = distance.gather(1, order.gather(1, number))
        # If the last listed logit is farther from the mean than what is kept, so are those below it.
        told = listed | (self._uncut() & (mean - self.below[:, -1:] > reach))
        self.known &= told | (p >= 1)
        inside = kept & (distance <= reach)
        low = torch.where(inside, self.values, torch.inf).amin(dim=-1, keepdim=True)
        high = torch.where(inside, self.values, -torch.inf).amax(dim=-1, keepdim=True)
        self.low = torch.where(p < 1, low, self.low)
        self.high = torch.where(p < 1, high, self.high)

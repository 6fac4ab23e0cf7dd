"""From logits to tokens, batched on tensors: what the cuts keep, and the token that one uniform number picks from it.

The token is the inverse CDF, in token-id order over the kept set, at one uniform number per (seed, branch, position). Nothing is
drawn by rejection and nothing depends on the other rows, so that any batch and any backend agree on equal logits.

The vocabulary is divided into chunks of 64 ids, and the largest logit of each chunk is computed once. The k largest logits lie
in the k chunks with the largest maxima, so most cuts touch a sixth of a row or less; a token is found by its chunk first, then
within it.
"""

from __future__ import annotations

from typing import Final

import torch

from streamkv.runner.sampling_cuts import LISTED, Cuts, looking_is_free, pick, thresholds

__all__ = ["CHUNK", "draw", "inverse_cdf", "largest_chunks", "most_probable", "num_chunks", "softmax"]

CHUNK: Final = 64
"""Ids per chunk: small against the vocabulary, and large enough that reducing a chunk is not slower than reading it."""

_CHOSEN: Final = LISTED + 16
"""Chunks per row that are looked into: more than logits are listed, because in 16 bits several are equal to the last of them."""

_BELOW_ONE: Final = 1 - 2.0**-40


def num_chunks(vocab_size: int) -> int:
    """Chunks of a row; the last one has at least one place that no token has, and its logit is always -inf."""
    return vocab_size // CHUNK + 1


def most_probable(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """The token with the largest logit, the lowest id among equals; torch.argmax of whole rows is seven times as slow.

    Args:
        logits: [num_rows, num_chunks, CHUNK].
        maxima: [num_rows, num_chunks], of its chunks.

    Returns:
        [num_rows] int64.
    """
    chunk = maxima.argmax(dim=-1)
    return chunk * CHUNK + _one_chunk(logits, chunk).argmax(dim=-1)


def draw(logits: torch.Tensor, maxima: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor) -> torch.Tensor:
    """One token per row from what its cuts keep.

    Args:
        logits: [num_rows, num_chunks, CHUNK] float32, divided by the temperature, -inf where there is no token.
        maxima: [num_rows, num_chunks], of its chunks.
        uniforms: [num_rows] float64 in (0, 1).

    Returns:
        [num_rows] int64. Rows with NaN or +inf give an arbitrary one, which may be a place that no token has.
    """
    chosen, candidates = largest_chunks(logits, maxima, _CHOSEN)
    probabilities = softmax(logits) if cuts.wide else None
    low, high = thresholds(logits, candidates.flatten(1), cuts, probabilities)
    if not looking_is_free(logits.device):
        weights = softmax(logits) if probabilities is None else probabilities
        return inverse_cdf(_keep(weights, logits, low, high, cuts), uniforms)
    tokens = torch.empty_like(chosen[:, 0])
    # Most rows can be finished in the chosen chunks: no other one holds a kept token.
    few = (maxima >= low[:, None]).sum(dim=-1) <= chosen.shape[-1]
    rows = few.nonzero().flatten()
    if len(rows):
        part = pick(candidates, rows)
        place = inverse_cdf(_keep(softmax(part), part, low[rows], high[rows], cuts), uniforms[rows])
        tokens[rows] = chosen[rows].gather(1, place[:, None] // CHUNK)[:, 0] * CHUNK + place % CHUNK
    rows = (~few).nonzero().flatten()
    if len(rows):
        part = pick(logits, rows)
        weights = softmax(part) if probabilities is None else pick(probabilities, rows)
        tokens[rows] = inverse_cdf(_keep(weights, part, low[rows], high[rows], cuts), uniforms[rows])
    return tokens


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over all chunks of a row; [num_rows, num_chunks, CHUNK]."""
    return torch.softmax(logits.flatten(1), dim=-1).view_as(logits)


def largest_chunks(logits: torch.Tensor, maxima: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks with the largest maxima, in the order of their ids.

    Returns:
        Their numbers, [num_rows, at most `most`] int64, and their logits, [num_rows, at most `most`, CHUNK].
    """
    rows, count = maxima.shape
    few = min(most, count)
    chosen = maxima.topk(few, dim=-1, sorted=False).indices.sort(dim=-1).values
    first = torch.arange(rows, device=logits.device)[:, None] * count
    return chosen, logits.view(-1, CHUNK).index_select(0, (chosen + first).flatten()).view(rows, few, CHUNK)


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First index at which the running sum of the weights exceeds `uniform` times their sum.

    Weights are summed in float32 within a chunk and in float64 over chunks: the running sum of 100,000 small numbers must not
    drift past the uniform number. Chunks without weight change no sum, so that a row gives the same with and without them.

    Args:
        weights: [num_rows, num_chunks, CHUNK] float32, at least 0.
        uniforms: [num_rows] float64 in (0, 1).

    Returns:
        [num_rows] int64, an index with weight; an arbitrary one for rows with NaN or without weight.
    """
    sums = weights.sum(dim=-1).double()  # [num_rows, num_chunks]
    cdf = sums.cumsum(dim=-1)
    target = uniforms[:, None] * cdf[:, -1:]
    chunk = torch.searchsorted(cdf, target, right=True).clamp_(max=weights.shape[1] - 1)
    mass = sums.gather(1, chunk)
    # Where in its chunk the target lies, as a share: sums of two precisions must not carry it past the chunk's end.
    share = ((target - (cdf.gather(1, chunk) - mass)) / mass).clamp_(0.0, _BELOW_ONE)
    inner = _one_chunk(weights, chunk[:, 0]).double().cumsum(dim=-1)  # [num_rows, CHUNK]
    place = torch.searchsorted(inner, share * inner[:, -1:], right=True).clamp_(max=CHUNK - 1)
    return (chunk * CHUNK + place)[:, 0]


def _one_chunk(values: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """[num_rows, CHUNK]: of each row the chunk with the given number."""
    return values[torch.arange(len(values), device=values.device), chunk]


def _keep(weights: torch.Tensor, logits: torch.Tensor, low: torch.Tensor, high: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Weights, now 0 outside the kept set; [num_rows, num_chunks, CHUNK]."""
    weights.masked_fill_(logits < low[:, None, None], 0.0)
    if cuts.typical:  # nothing else cuts from above
        weights.masked_fill_(logits > high[:, None, None], 0.0)
    return weights

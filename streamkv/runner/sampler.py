"""From logits to tokens, batched on tensors: greedy, temperature, top-k, top-p, log-probabilities.

The token is the inverse CDF, in token-id order over the kept set, at one uniform number per (seed, branch, position). Top-k and
top-p cut at exact thresholds, never by rejection, so that any backend agrees on equal logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from streamkv.runner.philox import uniform
from streamkv.sampling_params import TokenLogprobs

__all__ = ["SamplerRows", "kept_logits", "sample", "token_logprobs"]

_FIRST_CANDIDATES: Final = 128
"""Most top-p sets are smaller than this: a short top-k replaces the sort of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """Sampling parameters of the rows to sample, all tensors [num_rows].

    Attributes:
        temperature: float32; 0 = greedy.
        top_k: int64; 0 = all.
        top_p: float32 in (0, 1]; 1 = all.
        seed, branch, position: int64, see `philox.uniform`.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor


def sample(logits: torch.Tensor, rows: SamplerRows) -> torch.Tensor:
    """One token per row.

    Args:
        logits: [num_rows, vocab_size], any float dtype. Rows with NaN give an arbitrary token; callers drop them.
        rows: parameters per row.

    Returns:
        [num_rows] int64.
    """
    greedy = logits.argmax(dim=-1)  # [num_rows]
    random = (rows.temperature > 0).nonzero().flatten()
    if not len(random):
        return greedy
    kept = kept_logits(
        logits[random].float() / rows.temperature[random, None], rows.top_k[random], rows.top_p[random]
    )  # [num_random, vocab_size]
    # float64: the running sum of 100,000 small probabilities must not drift past the uniform number.
    cdf = torch.softmax(kept.double(), dim=-1).cumsum(dim=-1)
    target = uniform(rows.seed[random], rows.branch[random], rows.position[random])[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    greedy[random] = tokens.clamp_(max=logits.shape[-1] - 1)
    return greedy


def kept_logits(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set everything outside the kept set to -inf; ties with the last kept token stay in.

    Args:
        scaled: [num_rows, vocab_size] float32, temperature applied.
        top_k: [num_rows] int64; 0 = all.
        top_p: [num_rows] float32; applied to the distribution that top-k leaves.

    Returns:
        [num_rows, vocab_size].
    """
    vocab_size = scaled.shape[-1]
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    if int(k.min()) < vocab_size:
        largest = int(k[k < vocab_size].max())
        values = scaled.topk(largest, dim=-1).values  # descending
        threshold = values.gather(1, (k.clamp(max=largest) - 1)[:, None])
        threshold = torch.where(k[:, None] < vocab_size, threshold, -torch.inf)
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if bool((top_p < 1).any()):
        scaled = scaled.masked_fill(scaled < _top_p_threshold(scaled, top_p), -torch.inf)
    return scaled


def _top_p_threshold(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Smallest kept logit per row, [num_rows, 1]: the smallest set of most probable tokens whose probability reaches p."""
    total = torch.logsumexp(scaled.double(), dim=-1, keepdim=True)
    candidates = min(_FIRST_CANDIDATES, scaled.shape[-1])
    while True:
        values = scaled.topk(candidates, dim=-1).values
        probability = (values.double() - total).exp()
        before = probability.cumsum(dim=-1) - probability  # probability of everything more likely
        kept = before < top_p[:, None].double()
        # A row whose last candidate is kept may go on beyond them.
        if candidates == scaled.shape[-1] or not bool((kept[:, -1] & (top_p < 1)).any()):
            break
        candidates = min(candidates * 8, scaled.shape[-1])
    last = kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    threshold = values.gather(1, last)
    return torch.where(top_p[:, None] < 1, threshold, -torch.inf)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, wanted: list[tuple[int, int]]) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the model's own distribution, before temperature and cuts.

    Args:
        logits: [num_rows, vocab_size].
        tokens: [num_rows], the sampled tokens.
        wanted: (row, number of most probable tokens to list).

    Returns:
        By row.
    """
    if not wanted:
        return {}
    rows = torch.tensor([row for row, _ in wanted])
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    chosen = logprobs.gather(1, tokens[rows, None])[:, 0].tolist()
    most = max(count for _, count in wanted)
    values, ids = logprobs.topk(most, dim=-1)
    result = {}
    for index, ((row, count), top_values, top_ids) in enumerate(zip(wanted, values.tolist(), ids.tolist(), strict=True)):
        pairs = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        result[row] = TokenLogprobs(chosen[index], pairs)
    return result

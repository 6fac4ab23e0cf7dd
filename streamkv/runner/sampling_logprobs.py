"""Log-probabilities of the model's own distribution: of a given token, its rank, and of the most probable ones."""

from __future__ import annotations

from typing import Final

import torch

from streamkv.runner.sampler import CHUNK, largest_chunks, num_chunks
from streamkv.sampling_params import TokenLogprobs

__all__ = ["position_logprobs"]

_SLICE: Final = 2**20
"""Logits that are worked on at a time, 4 MiB in float32: temporaries stay small, and near the processor."""

_CHOSEN: Final = 32
"""Chunks per position that are looked into: more than the 20 that hold the most probable tokens."""


def position_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """Of one token per position and of the most probable ones there.

    Args:
        logits: [n, vocab_size], any float dtype; not changed.
        tokens: [n] int64.
        top: how many of the most probable tokens to list, at most 20; fewer if there are not as many.

    Returns:
        One per position. Equally probable tokens share the best rank, and are listed by their ids. NaN in, NaN out.
    """
    result: list[TokenLogprobs] = []
    size = max(1, _SLICE // logits.shape[-1])
    for start in range(0, len(logits), size):
        result += _some(logits[start : start + size], tokens[start : start + size], top)
    return result


def _some(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[TokenLogprobs]:
    count, vocab_size = logits.shape
    padded = torch.full((count, num_chunks(vocab_size) * CHUNK), -torch.inf, device=logits.device)
    padded[:, :vocab_size] = logits
    chunked = padded.view(count, -1, CHUNK)
    normaliser = torch.logsumexp(padded, dim=-1, keepdim=True)
    chosen = padded.gather(1, tokens[:, None])
    logprobs = (chosen - normaliser)[:, 0].tolist()
    maxima = chunked.amax(dim=-1)
    numbers, candidates = largest_chunks(chunked, maxima, _CHOSEN)
    ranks = (candidates > chosen[:, None]).sum(dim=(1, 2)) + 1
    beyond = ((maxima > chosen).sum(dim=-1) > numbers.shape[-1]).nonzero().flatten()
    if len(beyond):  # larger logits in other chunks too
        ranks[beyond] = (padded[beyond] > chosen[beyond]).sum(dim=-1) + 1
    top = min(top, vocab_size)
    if not top:
        return [TokenLogprobs(logprob, (), rank) for logprob, rank in zip(logprobs, ranks.tolist(), strict=True)]
    values, places = candidates.flatten(1).topk(top, dim=-1)
    # Where fewer logits than wanted are above -inf, a place that no token has may be among them.
    ids = (numbers.gather(1, places // CHUNK) * CHUNK + places % CHUNK).clamp_(max=vocab_size - 1)
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    pairs = zip(ids.gather(1, by_value).tolist(), (values - normaliser).tolist(), strict=True)
    rows = zip(logprobs, pairs, ranks.tolist(), strict=True)
    return [TokenLogprobs(logprob, tuple(zip(*pair, strict=True)), rank) for logprob, pair, rank in rows]

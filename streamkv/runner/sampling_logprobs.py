"""Log-probabilities of the model's own distribution: of a given token, its rank, and of the most probable ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from streamkv.runner.sampler import CHUNK, largest_chunks, num_chunks
from streamkv.runner.sampling_cuts import looking_is_free
from streamkv.runner.transfer import HostCopy
from streamkv.sampling_params import TokenLogprobs

__all__ = ["PositionLogprobs", "launch_logprobs", "without_top"]

_SLICE: Final = 2**20
"""Logits that are worked on at a time, 4 MiB in float32: temporaries stay small, and near the processor."""

_CHOSEN: Final = 32
"""Chunks per position that are looked into: more than the 20 that hold the most probable tokens."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Of n positions; nothing has waited for them yet.

    Attributes:
        copy: [n] float32, log-probability of the given token; [n] int64, its rank, where equally probable ones share the best;
            [n, top] int64 and float32, the most probable tokens and their log-probabilities, equal ones by their ids.
    """

    copy: HostCopy

    def read(self) -> list[TokenLogprobs]:
        """One per position; waits for the device."""
        chosen, ranks, ids, values = (part.tolist() for part in self.copy.wait())
        rows = zip(chosen, zip(ids, values, strict=True), ranks, strict=True)
        return [TokenLogprobs(logprob, tuple(zip(*pair, strict=True)), rank) for logprob, pair, rank in rows]


def launch_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> PositionLogprobs:
    """Of one token per position and of the most probable ones there. On a GPU the host waits for nothing.

    Args:
        logits: [n, vocab_size], any float dtype; not changed, and not needed any more once this has returned.
        tokens: [n] int64.
        top: how many of the most probable tokens to list, at most 20; fewer if there are not as many. NaN in, NaN out.
    """
    size = max(1, _SLICE // logits.shape[-1])
    starts = range(0, max(1, len(logits)), size)
    parts = [_some(logits[start : start + size], tokens[start : start + size], min(top, logits.shape[-1])) for start in starts]
    return PositionLogprobs(HostCopy(*(torch.cat(same) for same in zip(*parts, strict=True))))


def without_top(chosen: torch.Tensor, ranks: torch.Tensor) -> PositionLogprobs:
    """What is told where no list is wanted; both [n]."""
    none = chosen.new_empty((len(chosen), 0))
    return PositionLogprobs(HostCopy(chosen, ranks, none, none))


def _some(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> tuple[torch.Tensor, ...]:
    """What `PositionLogprobs` copies."""
    count, vocab_size = logits.shape
    padded = torch.full((count, num_chunks(vocab_size) * CHUNK), -torch.inf, device=logits.device)
    padded[:, :vocab_size] = logits
    chunked = padded.view(count, padded.shape[1] // CHUNK, CHUNK)
    normaliser = torch.logsumexp(padded, dim=-1, keepdim=True)
    chosen = padded.gather(1, tokens[:, None])
    maxima = chunked.amax(dim=-1)
    numbers, candidates = largest_chunks(chunked, maxima, _CHOSEN)
    ranks = _ranks(padded, chosen, maxima, candidates)
    values, places = candidates.flatten(1).topk(top, dim=-1)
    # Where fewer logits than wanted are above -inf, a place that no token has may be among them.
    ids = (numbers.gather(1, places // CHUNK) * CHUNK + places % CHUNK).clamp_(max=vocab_size - 1)
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return (chosen - normaliser)[:, 0], ranks, ids.gather(1, by_value), values - normaliser


def _ranks(padded: torch.Tensor, chosen: torch.Tensor, maxima: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """[n] int64: 1 + how many logits are larger than the chosen one."""
    if not looking_is_free(padded.device):
        return (padded > chosen).sum(dim=-1) + 1
    ranks = (candidates > chosen[:, None]).sum(dim=(1, 2)) + 1
    beyond = ((maxima > chosen).sum(dim=-1) > candidates.shape[1]).nonzero().flatten()
    if len(beyond):  # larger logits in other chunks too
        ranks[beyond] = (padded[beyond] > chosen[beyond]).sum(dim=-1) + 1
    return ranks

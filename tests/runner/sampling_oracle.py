"""What the sampler is held against: transformers' own processors, and the distribution that the sampler's tables describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from streamkv.runner.params import RowParams
from streamkv.runner.philox import uniform
from streamkv.runner.sampler import CHUNK, largest_chunks
from streamkv.runner.sampling_cuts import thresholds
from streamkv.runner.sampling_tables import RowSampler
from streamkv.sampling_params import Sampling

CLOSE = 2e-6
"""Where a uniform number is so near a step of the distribution, two ways of summing may differ by one token."""


@dataclass
class Row:
    """One request: what it asks for, and its tokens."""

    sampling: Sampling
    tokens: list[int]
    num_prompt: int
    branch: int = 0

    @property
    def params(self) -> RowParams:
        return RowParams(self.sampling, self.branch, self.tokens, self.num_prompt)


def sampling(**values: Any) -> Sampling:
    return Sampling(**({"max_tokens": 1000} | values))


def random_logits(seed: int, count: int, vocab_size: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def tables(
    rows: Sequence[Row], vocab_size: int, *, processors: Any = None, places: Sequence[int] | None = None, ops: Any = None
) -> RowSampler:
    """A sampler that has just admitted these rows."""
    made = RowSampler(
        num_rows=len(rows) + 40, max_len=400, vocab_size=vocab_size, device=torch.device("cpu"), processors=processors, ops=ops
    )
    for place, row in zip(places or range(len(rows)), rows, strict=True):
        made.admit(place, row.params)
    return made


def sample(rows: Sequence[Row], logits: torch.Tensor, *, processors: Any = None) -> list[int]:
    """Tokens of a batch that is admitted for this one step."""
    made = tables(rows, logits.shape[-1], processors=processors)
    return made.sample(np.arange(len(rows)), positions(rows), logits)[0].tolist()


def positions(rows: Sequence[Row]) -> np.ndarray:
    return np.array([len(row.tokens) for row in rows], np.int64)


def changed(rows: Sequence[Row], logits: torch.Tensor, made: RowSampler | None = None) -> torch.Tensor:
    """Logits after penalties, bias and masks as torch applies them; [num_rows, whole chunks]."""
    made = made or tables(rows, logits.shape[-1])
    way, work = made._batch_of(np.arange(len(rows))).way, made._copy(logits)
    if way.penalties is not None:
        made._penalties.apply(way.penalties, work)
    if way.masks is not None:
        made._masks.apply(way.masks, way.places, work, positions(rows))
    return work


@torch.inference_mode()
def distribution(rows: Sequence[Row], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sampler's own tables and cuts make of the logits: kept set, and float64 probabilities, [num_rows, vocab_size]."""
    made = tables(rows, logits.shape[-1])
    drawing = made._batch_of(np.arange(len(rows))).way.drawing
    work = changed(rows, logits, made)
    if drawing.temperature is not None:
        work = work / drawing.temperature
    scaled = work.clone()
    for some, cuts in drawing.cut:
        part = work[some].unflatten(1, (-1, CHUNK))
        _, candidates = largest_chunks(part, part.amax(dim=-1), 80)
        low, high = thresholds(part, candidates.flatten(1), cuts, torch.softmax(part.flatten(1), -1).view_as(part))
        outside = (work[some] < low[:, None]) | (work[some] > high[:, None])
        scaled[some] = work[some].masked_fill(outside, -torch.inf)
    scaled = scaled[:, : logits.shape[-1]].double()
    return torch.isfinite(scaled), torch.softmax(scaled, dim=-1)


def on_a_step(row: Row, logits: torch.Tensor, *tokens: int) -> bool:
    """Whether the uniform number lies between the tokens, as far as floats can tell."""
    _, probabilities = distribution([row], logits[None])
    number = float(uniform(*(torch.tensor([n]) for n in (row.sampling.seed, row.branch, len(row.tokens)))))
    reached = probabilities[0].cumsum(-1)
    return row.sampling.temperature > 0 and all(
        reached[token] - probabilities[0, token] <= number + CLOSE and reached[token] >= number - CLOSE for token in tokens
    )


def transformers_scores(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """transformers' processors in `generate`'s order, presence and frequency penalty by their plain definition; float64."""
    asked = row.sampling
    scores: Any = logits[None].double()
    ids: Any = torch.tensor([row.tokens], dtype=torch.long)
    output = row.tokens[row.num_prompt :]
    chain: list[Any] = []
    if asked.repetition_penalty != 1 and row.tokens:
        scores = RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)(ids, scores)
    for token in set(output):
        scores[0, token] -= asked.presence_penalty + asked.frequency_penalty * output.count(token)
    if asked.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): value for token, value in asked.logit_bias}))
    if asked.allowed_token_ids:
        others = sorted(set(range(logits.shape[-1])) - set(asked.allowed_token_ids))
        chain.append(SuppressTokensLogitsProcessor(others))
    if asked.bad_words:
        chain.append(NoBadWordsLogitsProcessor([list(word) for word in asked.bad_words]))
    if asked.min_tokens and asked.stop_token_ids:
        chain.append(MinNewTokensLengthLogitsProcessor(row.num_prompt, asked.min_tokens, list(asked.stop_token_ids)))
    if asked.temperature:
        chain.append(TemperatureLogitsWarper(asked.temperature))
        if asked.top_k:
            chain.append(TopKLogitsWarper(asked.top_k))
        if asked.top_p < 1:
            chain.append(TopPLogitsWarper(asked.top_p))
        if asked.min_p:
            chain.append(MinPLogitsWarper(asked.min_p))
        if asked.typical_p < 1:
            chain.append(TypicalLogitsWarper(asked.typical_p))
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0]


# -- parameters ------------------------------------------------------------------------------------------------------

CUTS = {
    "top_k": st.sampled_from([0, 0, 1, 2, 20, 63, 64, 65, 300, 10**6]),
    "top_p": st.sampled_from([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.999]),
    "min_p": st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0]),
    "typical_p": st.sampled_from([1.0, 1.0, 1e-3, 0.2, 0.7, 0.95]),
}


def rows_of(vocab_size: int, *, masks: bool = True) -> st.SearchStrategy[Row]:
    """Requests that use any of the features, often none."""
    token = st.integers(0, vocab_size - 1)
    tokens = st.lists(token | st.integers(0, min(3, vocab_size - 1)), min_size=1, max_size=20)
    parts: dict[str, Any] = {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5]),
        **CUTS,
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.0, -1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, -0.5, 0.7]),
        "logit_bias": st.just(()) | st.dictionaries(token, st.floats(-10, 10, width=32), max_size=5).map(lambda d: (*d.items(),)),
        "seed": st.integers(0, 2**63 - 1),
    }
    if masks:
        few = st.lists(token, min_size=1, max_size=max(1, vocab_size // 4), unique=True).map(tuple)
        word = st.lists(st.integers(0, min(3, vocab_size - 1)), min_size=1, max_size=4).map(tuple)
        parts |= {
            "allowed_token_ids": st.just(()) | st.just(()) | few,
            "bad_words": st.just(()) | st.lists(word, min_size=1, max_size=4, unique=True).map(tuple),
            "stop_token_ids": st.just(()) | few,
            "min_tokens": st.sampled_from([0, 0, 3, 10]),
        }
    asked = st.fixed_dictionaries(parts).map(lambda values: sampling(**values))
    return st.builds(
        lambda own, before, after, branch: Row(own, before + after, len(before), branch),
        asked,
        tokens,
        st.just([]) | tokens,
        st.integers(0, 3),
    )

"""What the sampling kernels are held against: the runner's own sampler, and the same definition in exact integers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from streamkv.runner.philox import uniform
from streamkv_kernels.device import SOURCES, Variant
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.sampling import Changes, Parameters, SamplingKernels
from tests.runner.sampling_oracle import Row, positions


def parameters_of(rows: Sequence[Row], vocab_size: int) -> Parameters:
    """As a backend makes them of requests."""
    own = [row.sampling for row in rows]
    return Parameters(
        temperature=torch.tensor([one.temperature for one in own], dtype=torch.float32),
        top_k=torch.tensor([one.top_k if one.top_k < vocab_size else 0 for one in own], dtype=torch.int64),
        top_p=torch.tensor([one.top_p for one in own], dtype=torch.float64),
        log_min_p=torch.tensor([one.min_p for one in own], dtype=torch.float64).log(),
        seed=torch.tensor([one.seed for one in own], dtype=torch.int64),
        branch=torch.tensor([row.branch for row in rows], dtype=torch.int64),
    )


def _joined(lists: Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.tensor([0, *np.cumsum([len(one) for one in lists])])
    return starts, torch.tensor([item for one in lists for item in one], dtype=dtype)


def changes_of(rows: Sequence[Row], vocab_size: int) -> Changes:
    """As a backend makes them of requests: short lists, and bits for what is allowed."""
    own = [row.sampling for row in rows]
    penalised = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) != (1.0, 0.0, 0.0) for one in own]
    seen = [sorted(set(row.tokens)) if some else [] for row, some in zip(rows, penalised, strict=True)]
    counts = [[row.tokens[row.num_prompt :].count(token) for token in ids] for row, ids in zip(rows, seen, strict=True)]
    banned = []
    for row, one in zip(rows, own, strict=True):
        words = [word[-1] for word in one.bad_words if len(word) == 1 or tuple(row.tokens[1 - len(word) :]) == word[:-1]]
        early = len(row.tokens) - row.num_prompt < one.min_tokens
        banned.append([token for token in (*words, *(one.stop_token_ids if early else ())) if token < vocab_size])
    allowed = torch.full((len(rows), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for index, one in enumerate(own):
        if one.allowed_token_ids:
            bits = torch.zeros(allowed.shape[1] * 32, dtype=torch.int64)
            bits[list(one.allowed_token_ids)] = 1
            allowed[index] = (bits.view(-1, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    biased = [[token for token, _ in one.logit_bias] for one in own]
    values = _joined([[value for _, value in one.logit_bias] for one in own], torch.float32)[1]
    factors = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in own]
    return Changes(
        torch.tensor(factors, dtype=torch.float32),
        (*_joined(seen), _joined(counts)[1]),
        (*_joined(biased), values),
        _joined(banned),
        allowed,
    )


def sample_by_kernels(device: EmulatedDevice, rows: Sequence[Row], logits: torch.Tensor, *, threads: int = 128) -> list[int]:
    kernels = SamplingKernels(device, threads=threads)
    vocab_size = logits.shape[1]
    changed = kernels.change(logits, changes_of(rows, vocab_size))
    where = torch.from_numpy(positions(rows))
    return kernels.sample(changed.logits, parameters_of(rows, vocab_size), where, changed.best).tolist()


# -- the definition, in integers -------------------------------------------------------------------------------------------


def weights_of(device: EmulatedDevice, below: torch.Tensor) -> torch.Tensor:
    """exp(x) of float32 numbers that are not positive, in units of 2^-44: `weight_of` in logits.cuh; int64."""
    source = Path(__file__).parent / "weights.cu"
    if device.sources == SOURCES:
        device = replace(device, sources=source.parent)
    else:
        shutil.copy(source, device.sources)  # a folder with headers in which a bug is planted
    out = torch.empty(below.shape, dtype=torch.int64)
    device.kernel(Variant("weights"), "weights").launch((1, 1, 1), (32, 1, 1), below.contiguous(), below.numel(), out)
    return out


def exact_token(device: EmulatedDevice, row: Row, logits: torch.Tensor) -> int:
    """The token of a row of logits, float32, as sample.cu defines it; no floating point but the logits' own."""
    asked = row.sampling
    if asked.temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    x = logits / torch.tensor(asked.temperature).clamp(min=1e-30)
    largest = x.max()
    weights = weights_of(device, x - largest).tolist()
    values = x.tolist()
    low = -math.inf
    if 0 < asked.top_k < len(values):
        low = sorted(values, reverse=True)[asked.top_k - 1]
    if asked.top_p < 1:
        kept = sorted(((value, weight) for value, weight in zip(values, weights, strict=True) if value >= low), reverse=True)
        target = max(1, math.ceil(asked.top_p * float(sum(weight for _, weight in kept))))
        reached = 0
        for value, weight in kept:
            if reached >= target and value < low:
                break
            low, reached = value, reached + weight
    if asked.min_p > 0:
        low = max(low, float((largest.double() + math.log(asked.min_p)).float()))
    weights = [weight if value >= low else 0 for value, weight in zip(values, weights, strict=True)]
    target = (2 * word_of(row) + 1) * sum(weights) // 2**33
    running = list(accumulate(weights))
    return next(token for token, reached in enumerate(running) if reached > target)


def word_of(row: Row) -> int:
    """The uniform number's 32 bits."""
    seed, position = row.sampling.seed, len(row.tokens)
    number = uniform(torch.tensor([seed]), torch.tensor([row.branch]), torch.tensor([position]))
    return int(number * 2**32)

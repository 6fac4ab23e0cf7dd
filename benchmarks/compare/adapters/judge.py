"""Who is right where two engines' greedy tokens part: the model in float32, and how far its own dtype strays from that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.compare.adapters import Opened
from benchmarks.compare.hf import load

_FLOOR = 2e-3
"""Least error, in standard deviations of the logits: llama.cpp strays 4.7e-3 from float32 where it computes in float32 itself."""


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `folder`, `dtype`, `threads`.

    Asked [tokens, [[position, candidates], ...]]: how far below the best logit in float32 each candidate for the token at that
    position is, and the largest error of any logit there when the model is run in `dtype`: [[[deficits], error], ...].
    """
    exact = load({**options, "dtype": "float32"})
    rounded = load(options)

    def answer(message: Any) -> list[list[Any]]:
        tokens, questions = message
        before = torch.tensor([position - 1 for position, _ in questions])
        true, near = (
            model(torch.tensor([tokens]), use_cache=False, logits_to_keep=before).logits[0].float() for model in (exact, rounded)
        )  # [questions, vocab_size]
        answers = []
        for row, (_, candidates) in enumerate(questions):
            error = max((true[row] - near[row]).abs().max(), _FLOOR * true[row].std())
            answers.append([(true[row].max() - true[row, candidates]).tolist(), float(error)])
        return answers

    with torch.inference_mode():
        yield Opened(answer)

"""What the runner is told of an admitted row, beside the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamkv.sampling_params import Sampling

__all__ = ["Pooling", "RowParams"]

Pooling = Literal["mean", "last"]


@dataclass(frozen=True, slots=True)
class RowParams:
    """How a newly admitted row is sampled.

    Attributes:
        branch: index of the parallel sample; with the seed and the position it picks the random number.
        tokens: prompt and output so far, as known at admission (a preempted request comes back with its output).
        num_prompt: how many of them are prompt.
        pooling: None, or how the prompt's last hidden states become one vector.
    """

    sampling: Sampling
    branch: int
    tokens: Sequence[int] = ()
    num_prompt: int = 0
    pooling: Pooling | None = None

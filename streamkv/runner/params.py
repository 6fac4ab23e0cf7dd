"""What the runner is told of an admitted row, beside the step."""

from __future__ import annotations

from dataclasses import dataclass

from streamkv.sampling_params import Sampling

__all__ = ["RowParams"]


@dataclass(frozen=True, slots=True)
class RowParams:
    """How a newly admitted row is sampled.

    Attributes:
        branch: index of the parallel sample; with the seed and the position it picks the random number.
    """

    sampling: Sampling
    branch: int

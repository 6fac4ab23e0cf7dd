"""What the runner is told of an admitted row beside the step, and what it says of an entry beside its token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamkv.sampling_params import Pooling, PromptLogprobs, Sampling, TokenLogprobs

__all__ = ["RowExtra", "RowParams"]


@dataclass(frozen=True, slots=True)
class RowParams:
    """What a newly admitted row wants.

    Attributes:
        branch: index of the parallel sample; with the seed and the position it picks the random number.
        tokens: prompt and output so far (a preempted request comes back with its output).
        num_prompt: how many of them are prompt.
        reported: prompt tokens whose log-probabilities have been reported already, before a preemption.
        pooling: None, or how the prompt's last hidden states become one vector.
        inherited: how many of the prompt's last tokens are output of those that it was forked from.
    """

    sampling: Sampling
    branch: int
    tokens: Sequence[int] = ()
    num_prompt: int = 0
    reported: int = 0
    pooling: Pooling | None = None
    inherited: int = 0

    @property
    def num_asked(self) -> int:
        """Tokens before the first that counts as output."""
        return self.num_prompt - self.inherited

    @property
    def prompt_logprobs(self) -> int | None:
        """How many alternatives to report for prompt tokens; the samples of one prompt report them once, with the first."""
        return self.sampling.prompt_logprobs if self.branch == 0 else None


@dataclass(frozen=True, slots=True)
class RowExtra:
    """`Sampled.extras` of one entry.

    Attributes:
        logprobs: of the sampled token.
        prompt_logprobs: of the prompt tokens that this step made known.
        embedding: the pooled vector, float32, little-endian.
    """

    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: bytes | None = None

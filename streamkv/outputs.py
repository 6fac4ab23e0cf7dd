"""What the Python API gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streamkv.sampling_params import TokenLogprobs

__all__ = ["CompletionOutput", "EmbeddingOutput", "RequestOutput", "ScoreOutput"]


@dataclass(slots=True)
class CompletionOutput:
    """One sample.

    Attributes:
        index: which of the `n` samples.
        text: without stop strings and, unless asked for, without special tokens; with `echo` the prompt's text comes first.
        token_ids: everything that was sampled, the ending token included.
        logprobs: one per token, if asked for.
        finish_reason: `stop` or `length`; None while it runs.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        prompt: its text, if it was given as text.
        prompt_token_ids: what the model read.
        num_cached_tokens: prompt tokens of the first sample that came from the prefix cache.
        prompt_logprobs: one per prompt token if asked for; the first is None, because nothing comes before it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """True once every sample has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One text as a vector.

    Attributes:
        embedding: the model's pooled last hidden states; of length 1 unless asked otherwise.
        prompt_token_ids: what the model read.
    """

    embedding: list[float]
    prompt_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """How probable the model holds a text.

    Attributes:
        logprob: sum of the natural log-probabilities of `token_ids`.
        perplexity: exp(-logprob / len(token_ids)).
        token_ids: the tokens that count: without a context all but the first, which has no probability.
        logprobs: one per token.
        rank: 1 = the most probable of the texts that were scored together, by `logprob`; equal ones by their order.
    """

    logprob: float
    perplexity: float
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    rank: int = 1

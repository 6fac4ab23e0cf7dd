"""What a reader of text is told about its streams. Values only, so that the sans-IO protocol can use them."""

from __future__ import annotations

import math
import struct
from typing import Final, Literal

import msgspec

from streamkv.engine.api import Miss
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs

__all__ = ["Delta", "Finished", "PromptRead", "Score", "Status", "StreamEvent", "Timings", "Why"]


_LARGEST_EXPONENT: Final = 700.0


class Status(msgspec.Struct, frozen=True, gc=False):
    """A request changed its state.

    Attributes:
        cached: prompt tokens that came from the prefix cache (with state "prefill").
        tokens: output tokens by then, those included whose text is held back: whether credit has grown since.
    """

    id: str
    state: Literal["prefill", "decode", "stalled", "preempted"]
    cached: int | None = None
    tokens: int = 0


class PromptRead(msgspec.Struct, frozen=True):
    """Log-probabilities of further prompt tokens, in order, before any delta of an output token."""

    id: str
    logprobs: PromptLogprobs


class Delta(msgspec.Struct, frozen=True):
    """Text that tokens offset .. offset + count - 1 made certain. Tokens whose text is held back come with a later delta.

    An echoed prompt is the text of a first delta without tokens.
    """

    id: str
    offset: int
    count: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Timings(msgspec.Struct, frozen=True, gc=False):
    """Seconds: waiting in the queue, prefill until the first token, both together (TTFT), first to last token."""

    queue: float
    prefill: float
    ttft: float
    decode: float


class Why(msgspec.Struct, frozen=True, gc=False):
    """Why a stream was slow, and why the prefix cache did not have more of its prompt.

    Attributes:
        chunks: steps that computed the prompt; 0 = it ended before.
        preemptions: how often others took its blocks.
        preempted: seconds from such a loss to its next token.
        stalled: seconds that it had no credit, i.e. waited for its reader.
        lag: 99th percentile of the event loop's delay while it lived, seconds; 0 where nobody measures it.
        miss: why the cache ended at token `miss_at` of the prompt (`streamkv.engine.api.Miss`); None = it had all it could.
    """

    chunks: int = 0
    preemptions: int = 0
    preempted: float = 0.0
    stalled: float = 0.0
    lag: float = 0.0
    miss: Miss | None = None
    miss_at: int = 0


class Score(msgspec.Struct, frozen=True, gc=False):
    """How probable a text is: the sum of its tokens' natural log-probabilities.

    `tokens` is the number of tokens that were scored: all of the continuation, or all but the first where nothing precedes it.
    """

    logprob: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(-logprob / tokens); 1 for no tokens."""
        # A token that the model holds impossible makes a text of infinite perplexity, not an error.
        mean = -self.logprob / self.tokens if self.tokens else 0.0
        return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


class Finished(msgspec.Struct, frozen=True):
    """The last event of a request; there is exactly one.

    `embedding`: the pooled vector, float32 little-endian. `score`: of a request that asked for one.
    """

    id: str
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Timings
    error: tuple[str, str] | None = None
    embedding: bytes | None = None
    score: Score | None = None
    why: Why = Why()

    def vector(self) -> list[float]:
        """The embedding as numbers; empty without one."""
        data = self.embedding or b""
        return list(struct.unpack(f"<{len(data) // 4}f", data))


StreamEvent = Status | PromptRead | Delta | Finished

"""What a caller may ask of the sampler, what the engine is told of it, and the log-probabilities that come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from streamkv.errors import InvalidRequestError

__all__ = [
    "MAX_ALLOWED_TOKEN_IDS",
    "MAX_BAD_WORDS",
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_N",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKEN_IDS",
    "Pooling",
    "PromptLogprobs",
    "Sampling",
    "SamplingParams",
    "TokenLogprobs",
]

Pooling = Literal["mean", "last"]
"""How the last hidden states of a prompt become one vector: their mean, or that of the last token."""

POOLINGS: Final[tuple[Pooling, ...]] = ("mean", "last")

MAX_N = 16
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 64
MAX_STOP_TOKEN_IDS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 64
MAX_TOKENS_BOUND = 2**24
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_PROCESSORS = 8


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Every value is checked here, before anything is copied or tokenised.

    The logits go through these in this order: repetition, presence and frequency penalty; `logit_bias`; what is not allowed
    (allowed and bad token ids, bad words, endings before `min_tokens`); logits processors; temperature; top-k; top-p; min-p;
    typical-p. Each of the cuts works on the distribution that the cuts before it leave, as in transformers.

    Attributes:
        n: number of parallel samples that share the prompt's KV blocks, 1..16.
        max_tokens: most tokens to generate; None = up to the model's context; 0 = none, for `prompt_logprobs` or `echo`.
        min_tokens: no ending (end-of-sequence, stop ids, stop strings) before this many tokens, 0..max_tokens.
        temperature: 0 = greedy; otherwise logits are divided by it, (0, 100].
        top_k: keep the k most probable tokens; 0 or -1 = all.
        top_p: keep the smallest set of tokens whose probability reaches p, (0, 1].
        min_p: keep tokens at least p times as probable as the most probable one, [0, 1]; 0 = all.
        typical_p: keep the smallest set of tokens whose surprise is nearest to the expected one and whose probability reaches
            p, (0, 1] (Meister et al., "Locally typical sampling", arXiv 2202.00666); 1 = all.
        repetition_penalty: logits of tokens seen in prompt or output are divided (positive) or multiplied (negative) by it,
            (0, 10]; 1 = none (Keskar et al., CTRL, arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens seen in the output, [-2, 2].
        frequency_penalty: subtracted once for every time a token was seen in the output, [-2, 2].
        logit_bias: added to the logits of up to 300 token ids, each [-100, 100].
        allowed_token_ids: up to 1024 ids; no other token is sampled; empty = all.
        bad_token_ids: up to 128 ids that are never sampled.
        bad_words: up to 128 texts of 1..64 characters whose tokens are never sampled one after the other.
        seed: seed of the counter-based generator; None = drawn once per request.
        stop: up to 4 strings, each of 1..64 characters, that end the text and are not part of it.
        stop_token_ids: up to 16 token ids that end the output.
        include_stop_str_in_output: the text ends with the stop string, or the text of the stop token, that ended it.
        ignore_eos: go on past the model's end-of-sequence token.
        logprobs: None = none; k = the chosen token's and the k most probable tokens' log-probabilities, 0..20.
        prompt_logprobs: the same for every prompt token but the first, given those before it; does not read the prefix cache.
        echo: the text begins with the prompt; with `logprobs` the prompt's log-probabilities are reported too.
        skip_special_tokens: leave special tokens out of the text.
        logits_processors: name -> arguments, for processors that the server was started with (docs/sampling.md).

    Raises:
        InvalidRequestError: a value is of the wrong type or out of its bounds; `param` names it.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True
    logits_processors: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        self._check_lengths()
        self._check_cuts()
        self._check_penalties()
        self._check_endings()
        for name in ("include_stop_str_in_output", "ignore_eos", "echo", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false", param=name)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        processors = self.logits_processors
        if not isinstance(processors, Mapping) or len(processors) > MAX_PROCESSORS or not all(type(k) is str for k in processors):
            raise InvalidRequestError(
                f"logits_processors must map at most {MAX_PROCESSORS} names to their arguments", param="logits_processors"
            )

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS_BOUND)
        if self.max_tokens == 0 and self.prompt_logprobs is None and not self.echo:
            raise InvalidRequestError("max_tokens must be at least 1, or 0 with prompt_logprobs or echo", param="max_tokens")
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS_BOUND)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens must be at most max_tokens", param="min_tokens")

    def _check_cuts(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, MAX_TOKEN_ID)
        for name in ("top_p", "typical_p"):
            _number(name, getattr(self, name), 0.0, 1.0)
            if getattr(self, name) == 0.0:
                raise InvalidRequestError(f"{name} must be greater than 0 and at most 1", param=name)
        _number("min_p", self.min_p, 0.0, 1.0)

    def _check_penalties(self) -> None:
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0)
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError("repetition_penalty must be greater than 0 and at most 10", param="repetition_penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers", param="logit_bias")
        for token_id, value in bias.items():
            _integer("logit_bias", token_id, 0, MAX_TOKEN_ID)
            _number("logit_bias", value, -100.0, 100.0)
        self._keep_ids("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS)
        self._keep_ids("bad_token_ids", MAX_BAD_WORDS)
        self._keep_texts("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)

    def _check_endings(self) -> None:
        self._keep_texts("stop", MAX_STOP_STRINGS, MAX_STOP_CHARS)
        self._keep_ids("stop_token_ids", MAX_STOP_TOKEN_IDS)

    def _keep_ids(self, name: str, most: int) -> None:
        ids = getattr(self, name)
        if not isinstance(ids, (list, tuple)) or len(ids) > most:
            raise InvalidRequestError(f"{name} must be at most {most} token ids", param=name)
        for token_id in ids:
            _integer(name, token_id, 0, MAX_TOKEN_ID)
        object.__setattr__(self, name, tuple(ids))

    def _keep_texts(self, name: str, most: int, longest: int) -> None:
        texts = getattr(self, name)
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or len(texts) > most:
            raise InvalidRequestError(f"{name} must be at most {most} strings", param=name)
        for text in texts:
            if not isinstance(text, str) or not 1 <= len(text) <= longest:
                raise InvalidRequestError(f"each {name} must be a string of 1 to {longest} characters", param=name)
        object.__setattr__(self, name, tuple(texts))

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def named_token_ids(self) -> tuple[tuple[str, int], ...]:
        """(parameter, largest token id that it names), to be compared with the width of the logits."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids,
            "bad_token_ids": self.bad_token_ids,
        }
        return tuple((name, max(ids)) for name, ids in named.items() if ids)


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of `SamplingParams` that the engine needs; values are already checked, seed and limits resolved.

    Attributes:
        max_tokens: most tokens to generate; prompt + max_tokens fits the model's context. 0 = only compute the prompt.
        min_tokens: until this many tokens are sampled, no token of `stop_token_ids` is.
        top_k: 0 = all.
        logit_bias: (token id, what is added), ids distinct.
        allowed_token_ids: empty = all.
        bad_words: sequences of token ids, at least one each, whose last token is not sampled after the others.
        seed: 0 <= seed < 2**63; with `branch` and the position it determines every random choice.
        stop_token_ids: ids that end the output, the model's end-of-sequence ids included unless ignored.
        logprobs: None, or number of most probable tokens to report besides the chosen one.
        prompt_logprobs: the same for prompt tokens, the first one left out.
        processors: (name, arguments) of logits processors.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    processors: tuple[tuple[str, Any], ...] = ()

    @property
    def is_memoryless(self) -> bool:
        """Whether what is sampled follows from logits and position alone, and nothing is told beside it.

        Then several positions can be sampled before it is known which of them count.
        """
        return (
            (self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.min_tokens) == (1.0, 0.0, 0.0, 0)
            and not (self.logit_bias or self.allowed_token_ids or self.bad_words or self.processors)
            and self.logprobs is None
            and self.prompt_logprobs is None
        )


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution: before penalties, temperature and cuts.

    Attributes:
        chosen: log-probability of the sampled (or the prompt's own) token.
        top: (token id, log-probability), most probable first.
        rank: place of that token among all, 1 = most probable.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the prompt tokens start, start + 1, ..., each given the tokens before it. `start` is at least 1."""

    start: int
    entries: tuple[TokenLogprobs, ...]


def _integer(name: str, value: object, low: int, high: int) -> None:
    # bool is an int in Python, but `n: true` is a mistake and not a 1.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer from {low} to {high}", param=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    # An integer may be too large for a float, so the bounds are asked first.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and math.isfinite(value)
    if not ok:
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}", param=name)

"""What a caller may ask of the sampler, what the engine is told of it, and the log-probabilities that come back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from streamkv.errors import InvalidRequestError

__all__ = ["MAX_LOGPROBS", "MAX_N", "MAX_STOP_STRINGS", "MAX_STOP_TOKEN_IDS", "Sampling", "SamplingParams", "TokenLogprobs"]

MAX_N = 16
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 64
MAX_STOP_TOKEN_IDS = 16
MAX_LOGPROBS = 20
MAX_TOKENS_BOUND = 2**24
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Every value is checked here, before anything is copied or tokenised.

    Attributes:
        n: number of parallel samples that share the prompt's KV blocks, 1..16.
        max_tokens: most tokens to generate; None = up to the model's context.
        temperature: 0 = greedy; otherwise logits are divided by it, (0, 100].
        top_k: keep the k most probable tokens; 0 = all.
        top_p: keep the smallest set of tokens whose probability reaches p, (0, 1].
        seed: seed of the counter-based generator; None = drawn once per request.
        stop: up to 4 strings, each of 1..64 characters, that end the text and are not part of it.
        stop_token_ids: up to 16 token ids that end the output.
        ignore_eos: go on past the model's end-of-sequence token.
        logprobs: None = none; k = the chosen token's and the k most probable tokens' log-probabilities, 0..20.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of its bounds; `param` names it.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS_BOUND)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be greater than 0 and at most 1", param="top_p")
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop must be at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(f"each stop must be a string of 1 to {MAX_STOP_CHARS} characters", param="stop")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or len(ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"stop_token_ids must be at most {MAX_STOP_TOKEN_IDS} token ids", param="stop_token_ids")
        for token_id in ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false", param=name)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always taken."""
        return self.temperature == 0.0


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of `SamplingParams` that the engine needs; values are already checked, seed and limits resolved.

    Attributes:
        max_tokens: most tokens to generate, at least 1; prompt + max_tokens fits the model's context.
        stop_token_ids: ids that end the output, the model's end-of-sequence ids included unless ignored.
        seed: 0 <= seed < 2**63; with `branch` and the position it determines every random choice.
        logprobs: None, or number of most probable tokens to report besides the chosen one.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one output position, before temperature and cuts.

    Attributes:
        chosen: log-probability of the sampled token.
        top: (token id, log-probability), most probable first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


def _integer(name: str, value: object, low: int, high: int) -> None:
    # bool is an int in Python, but `n: true` is a mistake and not a 1.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer from {low} to {high}", param=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(float(value)) or not low <= float(value) <= high:  # type: ignore[arg-type]  # ok implies a number
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}", param=name)

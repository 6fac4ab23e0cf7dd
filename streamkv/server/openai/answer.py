"""What every dialect of an answer has to offer; what it is sent through does not matter here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from streamkv.sampling_params import SamplingParams, TokenLogprobs
from streamkv.server.openai.generation import Piece
from streamkv.server.openai.names import TokenNames
from streamkv.server.openai.requests import UsageWish
from streamkv.server.openai.shapes import Finish, Head, PromptLogprobEntries, PromptTokensDetails, Tier, Usage
from streamkv.text.events import Finished
from streamkv.text.streams import PreparedPrompt

__all__ = ["Answer", "AnswerContext", "Counter", "finish_of"]


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What an answer is built from, besides the model's output.

    Attributes:
        head: what all of its events have in common.
        prompts: each with `params.n` samples; a chat has one.
        usage: which chunks tell the usage.
        prompt_logprobs: of each prompt; filled before its first piece comes.
    """

    head: Head
    params: SamplingParams
    prompts: Sequence[PreparedPrompt]
    names: TokenNames
    usage: UsageWish
    prompt_logprobs: Sequence[Sequence[TokenLogprobs]]
    service_tier: Tier = UNSET

    def entries_of(self, number: int) -> PromptLogprobEntries | UnsetType:
        """What the answer says of a prompt's own tokens, if that was asked for."""
        if self.params.prompt_logprobs is None:
            return UNSET
        return self.names.prompt(self.prompts[number].token_ids, self.prompt_logprobs[number])

    def usage_of(self, counter: Counter) -> Usage | UnsetType | None:
        """What a chunk before the last one says of it."""
        return UNSET if self.usage == "none" else counter.usage if self.usage == "each" else None


class Answer(Protocol):
    """One dialect's form of one answer: chunk by chunk, or whole. Both take the same pieces and hold the same text."""

    def chunks(self, piece: Piece) -> Iterable[msgspec.Struct]:
        """Events for what is new."""

    def last_chunk(self) -> msgspec.Struct | None:
        """The event after the last choice has ended, if one was asked for."""

    def whole(self, pieces: Iterable[Piece]) -> msgspec.Struct:
        """Everything at once; every sample has ended."""


class Counter:
    """Adds up the usage of all samples."""

    def __init__(self, context: AnswerContext) -> None:
        self._samples = context.params.n
        self._prompt_tokens = sum(len(prepared.token_ids) for prepared in context.prompts)
        self._completion_tokens = 0
        self._cached_tokens = 0

    def count(self, piece: Piece) -> None:
        """Take a piece into account."""
        self._completion_tokens += len(piece.token_ids)
        if piece.finished is not None and piece.index % self._samples == 0:  # a prompt counts once
            self._cached_tokens += piece.finished.cached_tokens

    @property
    def usage(self) -> Usage:
        """Until now."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(self._cached_tokens))


def finish_of(finished: Finished) -> Finish:
    """Why a sample ended that did not fail."""
    return "stop" if finished.finish_reason == "stop" else "length"

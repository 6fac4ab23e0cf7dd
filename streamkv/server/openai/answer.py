"""What every dialect of an answer has to offer; what it is sent through does not matter here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from streamkv.sampling_params import SamplingParams, TokenLogprobs
from streamkv.server.openai.generation import Piece
from streamkv.server.openai.names import TokenNames
from streamkv.server.openai.requests import UsageWish
from streamkv.server.openai.shapes import Finish, PromptTokensDetails, Usage
from streamkv.text.events import Finished
from streamkv.text.streams import PreparedPrompt

__all__ = ["Answer", "AnswerContext", "Counter", "finish_of"]


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What an answer is built from, besides the model's output.

    Attributes:
        ident: one id for all of it.
        created: Unix time in seconds.
        usage: which chunks tell the usage.
        prompt_logprobs: filled before the first piece comes.
    """

    ident: str
    created: int
    model: str
    params: SamplingParams
    prepared: PreparedPrompt
    names: TokenNames
    usage: UsageWish
    prompt_logprobs: list[TokenLogprobs]


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

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0

    def count(self, piece: Piece) -> None:
        """Take a piece into account."""
        self._completion_tokens += len(piece.token_ids)
        if piece.finished is not None and piece.index == 0:
            self._cached_tokens = piece.finished.cached_tokens

    @property
    def usage(self) -> Usage:
        """Until now."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(self._cached_tokens))


def finish_of(finished: Finished) -> Finish:
    """Why a sample ended that did not fail."""
    return "stop" if finished.finish_reason == "stop" else "length"

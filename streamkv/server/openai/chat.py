"""Chat completions: choices made of pieces of output. The reply is plain text; reading tool calls out of it will happen here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from streamkv.server.openai.answer import AnswerContext, Counter, finish_of
from streamkv.server.openai.generation import Piece
from streamkv.server.openai.shapes import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessageOut,
    Usage,
)

__all__ = ["ChatAnswer"]

_ROLE: Final = ChatDelta(role="assistant", content="")
_NOTHING: Final = ChatDelta()


class ChatAnswer:
    """One `/v1/chat/completions`."""

    def __init__(self, context: AnswerContext) -> None:
        self._context = context
        self._counter = Counter(context)
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        """The role before a choice's first text, and its end in a chunk of its own."""
        index, text = piece.index, piece.text
        self._counter.count(piece)
        if index not in self._begun:
            self._begun.add(index)
            yield self._chunk([ChatChunkChoice(index, _ROLE)])
        logprobs = self._logprobs(piece) if piece.logprobs else None
        if text or logprobs is not None:
            yield self._chunk([ChatChunkChoice(index, ChatDelta(content=text), logprobs)])
        if piece.finished is not None:
            yield self._chunk([ChatChunkChoice(index, _NOTHING, finish_reason=finish_of(piece.finished))])

    def last_chunk(self) -> ChatChunk | None:
        """The usage."""
        return None if self._context.usage == "none" else self._chunk([], self._counter.usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        context = self._context
        return ChatChunk(choices, usage or context.usage_of(self._counter), context.service_tier, **context.head)

    def whole(self, pieces: Iterable[Piece]) -> ChatCompletion:
        """All choices."""
        context = self._context
        choices = [self._choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return ChatCompletion(choices, self._counter.usage, context.service_tier, context.entries_of(0), **context.head)

    def _choice(self, piece: Piece) -> ChatChoice:
        assert piece.finished is not None
        self._counter.count(piece)
        logprobs = None if self._context.params.logprobs is None else self._logprobs(piece)
        return ChatChoice(piece.index, ChatMessageOut(piece.text), logprobs, finish_of(piece.finished))

    def _logprobs(self, piece: Piece) -> ChatLogprobs:
        return self._context.names.chat(piece.token_ids, piece.logprobs)

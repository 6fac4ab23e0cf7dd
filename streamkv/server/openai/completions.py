"""Text completions: choices made of pieces of output."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from streamkv.sampling_params import TokenLogprobs
from streamkv.server.openai.answer import AnswerContext, Counter, finish_of
from streamkv.server.openai.generation import Piece
from streamkv.server.openai.names import Offsets
from streamkv.server.openai.shapes import Completion, CompletionChoice, CompletionLogprobs, Usage

__all__ = ["CompletionAnswer"]


class CompletionAnswer:
    """One `/v1/completions`."""

    def __init__(self, context: AnswerContext) -> None:
        self._context = context
        self._counter = Counter(len(context.prepared.token_ids))
        self._offsets: dict[int, Offsets] = {}

    def chunks(self, piece: Piece) -> Iterable[Completion]:
        """Text, and the choice's end in a chunk of its own."""
        text, logprobs = piece.text, self._logprobs(piece)
        self._counter.count(piece)
        if text or logprobs is not None:
            yield self._chunk([CompletionChoice(piece.index, text, logprobs)])
        if piece.finished is not None:
            yield self._chunk([CompletionChoice(piece.index, "", finish_reason=finish_of(piece.finished))])

    def last_chunk(self) -> Completion | None:
        """The usage."""
        return None if self._context.usage == "none" else self._chunk([], self._counter.usage)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None = UNSET) -> Completion:
        context = self._context
        if usage is UNSET and context.usage != "none":
            usage = self._counter.usage if context.usage == "each" else None
        return Completion(context.ident, context.created, context.model, choices, usage)

    def whole(self, pieces: Iterable[Piece]) -> Completion:
        """All choices."""
        choices = [self._choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return self._chunk(choices, self._counter.usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        assert piece.finished is not None
        self._counter.count(piece)
        context = self._context
        of_prompt = (
            UNSET
            if context.params.prompt_logprobs is None
            else context.names.prompt(context.prepared.token_ids, context.prompt_logprobs)
        )
        return CompletionChoice(piece.index, piece.text, self._logprobs(piece), finish_of(piece.finished), of_prompt)

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        """None if none were asked for, or there is nothing to say. An echoed prompt comes with the first piece."""
        context = self._context
        if context.params.logprobs is None:
            return None
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        positions: list[int] = []
        offsets = self._offsets.get(piece.index)
        if offsets is None:
            offsets = self._offsets[piece.index] = self._output_offsets()
            if context.params.echo:
                token_ids += context.prepared.token_ids
                logprobs += [None, *context.prompt_logprobs]
                positions += self._prompt_offsets()
        token_ids += piece.token_ids
        logprobs += piece.logprobs
        positions += offsets.take(piece.token_ids)
        return context.names.completion(token_ids, logprobs, positions) if token_ids else None

    def _output_offsets(self) -> Offsets:
        prepared = self._context.prepared
        return Offsets(
            self._context.names.tokenizer,
            skip_special_tokens=prepared.skip_special_tokens,
            start=len(prepared.echo),
            after=prepared.token_ids,
        )

    def _prompt_offsets(self) -> list[int]:
        prepared = self._context.prepared
        offsets = Offsets(self._context.names.tokenizer, skip_special_tokens=prepared.skip_special_tokens)
        return offsets.take(prepared.token_ids)

"""Text completions: choices made of pieces of output."""

from __future__ import annotations

from collections.abc import Iterable

from streamkv.sampling_params import TokenLogprobs
from streamkv.server.openai.answer import AnswerContext, Counter, finish_of
from streamkv.server.openai.generation import Piece
from streamkv.server.openai.names import Offsets
from streamkv.server.openai.shapes import Completion, CompletionChoice, CompletionLogprobs, Usage
from streamkv.text.streams import PreparedPrompt

__all__ = ["CompletionAnswer"]


class CompletionAnswer:
    """One `/v1/completions`."""

    def __init__(self, context: AnswerContext) -> None:
        self._context = context
        self._counter = Counter(context)
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

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(choices, usage or self._context.usage_of(self._counter), **self._context.head)

    def whole(self, pieces: Iterable[Piece]) -> Completion:
        """All choices."""
        choices = [self._choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return self._chunk(choices, self._counter.usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        assert piece.finished is not None
        self._counter.count(piece)
        entries = self._context.entries_of(self._number(piece))
        return CompletionChoice(piece.index, piece.text, self._logprobs(piece), finish_of(piece.finished), entries)

    def _number(self, piece: Piece) -> int:
        """Which prompt it goes on from."""
        return piece.index // self._context.params.n

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        """None if none were asked for, or there is nothing to say. An echoed prompt comes with the first piece."""
        context, number = self._context, self._number(piece)
        if context.params.logprobs is None:
            return None
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        positions: list[int] = []
        offsets = self._offsets.get(piece.index)
        if offsets is None:
            offsets = self._offsets[piece.index] = self._output_offsets(context.prompts[number])
            if context.params.echo:
                token_ids += context.prompts[number].token_ids
                logprobs += [None, *context.prompt_logprobs[number]]
                positions += self._prompt_offsets(context.prompts[number])
        token_ids += piece.token_ids
        logprobs += piece.logprobs
        positions += offsets.take(piece.token_ids)
        return context.names.completion(token_ids, logprobs, positions) if token_ids else None

    def _output_offsets(self, prepared: PreparedPrompt) -> Offsets:
        return Offsets(
            self._context.names.tokenizer,
            skip_special_tokens=prepared.skip_special_tokens,
            start=len(prepared.echo),
            after=prepared.token_ids,
        )

    def _prompt_offsets(self, prepared: PreparedPrompt) -> list[int]:
        offsets = Offsets(self._context.names.tokenizer, skip_special_tokens=prepared.skip_special_tokens)
        return offsets.take(prepared.token_ids)

"""Exact incremental detokenisation: the pieces always join to the decoding of all tokens, and no piece holds half a character.

Two ways, because decoders differ in what a later token can change:

- Byte-level BPE joins bytes: Python's incremental UTF-8 decoder is exact and O(1) a token.
- All others join strings, whose first may lose its leading space, and turn *runs* of byte tokens (`<0xE2>` ...) into text as a
  whole: one bad byte spoils its run. So text is released when a token that is no byte follows, decoded together with the
  piece before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from streamkv.text.tokenizer import TextTokenizer

__all__ = ["IncrementalDetokenizer", "byte_level_alphabet", "whole_text"]

_CONTEXT: Final = 8
"""Tokens of the last piece that are decoded again with the next one."""


class IncrementalDetokenizer:
    """Turns one request's tokens into text as they come."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        """Start with no text.

        Args:
            prompt_ids: the tokens before the output. Their text is not given out, but what follows is the text that follows
                them: a first word keeps its leading space. A character that they leave unfinished comes with the output.
        """
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._before: list[int] = []  # tokens before the held ones: context for the next piece
        self._held: list[int] = []
        self._follow(prompt_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens make certain; the rest is held back."""
        new = self._shown(token_ids)
        if self._bytes is not None:
            return self._bytes.decode(b"".join(map(self._tokenizer.token_bytes, new)))
        byte_ids = self._tokenizer.byte_ids
        end = next((index for index in range(len(new), 0, -1) if new[index - 1] not in byte_ids), 0)
        if not end:
            self._held += new
            return ""
        piece, self._held = self._held + new[:end], new[end:]
        return self._release(piece)

    def finish(self) -> str:
        """Everything still held back."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        piece, self._held = self._held, []
        return self._release(piece) if piece else ""

    def _shown(self, token_ids: Iterable[int]) -> list[int]:
        # Logits can be wider than the vocabulary; such an id must not become the context of the next token.
        skip, known_ids = self._skip, self._tokenizer.known_ids
        return [token for token in token_ids if token not in skip and token in known_ids]

    def _follow(self, prompt_ids: Sequence[int]) -> None:
        tail = list(islice((token for last in reversed(prompt_ids) for token in self._shown((last,))), _CONTEXT))[::-1]
        unfinished = _unfinished(b"".join(map(self._tokenizer.token_bytes, tail)))
        if self._bytes is not None:
            self._bytes.decode(unfinished)
            return
        # Without byte level only byte tokens can leave a character unfinished: one byte each.
        whole = len(tail) - len(unfinished)
        self._before, self._held = tail[:whole], tail[whole:]
        if self._before and self._before[-1] in self._tokenizer.byte_ids:
            # Or a run that begins in the prompt, perhaps before the tail, could spoil the output's first bytes.
            self._before = [self._tokenizer.neutral_id]

    def _release(self, piece: list[int]) -> str:
        decode = self._tokenizer.decode_raw
        text = decode(self._before + piece)[len(decode(self._before)) :] if self._before else decode(piece)
        self._before = piece[-_CONTEXT:]
        return text


def whole_text(tokenizer: TextTokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of a prompt without a character that it leaves unfinished: an `IncrementalDetokenizer` goes on from there."""
    if tokenizer.is_byte_level:
        return IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens).push(token_ids)
    tail = token_ids[-_CONTEXT:]
    unfinished = len(_unfinished(b"".join(map(tokenizer.token_bytes, tail))))
    return tokenizer.decode(token_ids[: len(token_ids) - unfinished], skip_special_tokens=skip_special_tokens)


def _unfinished(data: bytes) -> bytes:
    """The first bytes of a character at the end of data that may begin anywhere; at most three."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return bytes(decoder.getstate()[0])


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the rest is moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

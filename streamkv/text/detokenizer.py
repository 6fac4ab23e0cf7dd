"""Exact incremental detokenisation: the pieces always join to the decoding of all tokens, and no piece holds half a character.

Two ways, because decoders differ in what a later token can change:

- Byte-level BPE joins bytes: Python's incremental UTF-8 decoder is exact and O(1) a token.
- All others join strings, whose first may lose its leading space, and turn *runs* of byte tokens (`<0xE2>` ...) into text as a
  whole: one bad byte spoils its run. So text is released when a token that is no byte follows, decoded together with the
  piece before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamkv.text.tokenizer import TextTokenizer

__all__ = ["IncrementalDetokenizer", "byte_level_alphabet"]


class IncrementalDetokenizer:
    """Turns one request's tokens into text as they come."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start with no text; the prompt is not part of it."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._before: list[int] = []  # tokens of the last released piece: context for the next
        self._held: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens make certain; the rest is held back."""
        if self._bytes is not None:
            token_bytes = self._tokenizer.token_bytes
            return self._bytes.decode(b"".join(token_bytes(token) for token in token_ids if token not in self._skip))
        byte_ids, known_ids = self._tokenizer.byte_ids, self._tokenizer.known_ids
        # Logits can be wider than the vocabulary; such an id must not become the context of the next token.
        new = [token for token in token_ids if token not in self._skip and token in known_ids]
        end = max((index for index, token in enumerate(new, 1) if token not in byte_ids), default=0)
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

    def _release(self, piece: list[int]) -> str:
        decode = self._tokenizer.decode_raw
        text = decode(self._before + piece)[len(decode(self._before)) :] if self._before else decode(piece)
        self._before = piece[-8:]
        return text


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the rest is moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

"""What single tokens are: special, bytes of a run, known at all; and what each adds to a text, in bytes and to be shown."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any, Final

from tokenizers import Tokenizer

from streamkv.errors import ModelLoadError
from streamkv.text.detokenizer import byte_level_alphabet

__all__ = ["Pieces"]

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_SERVED_DECODERS: Final = frozenset(
    {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece", None}
)
"""Those whose text grows at the end only, so that it can be streamed."""


class Pieces:
    """Tables of one tokenizer's vocabulary.

    Attributes:
        special_ids: tokens that mean something to the model and nothing to a reader.
        known_ids: all that the vocabulary has; logits can be wider.
        byte_ids: tokens that are one byte of a run which is decoded as a whole (`<0xE2>`).
        is_byte_level: every token stands for bytes, and the text is their join.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the vocabulary.

        Raises:
            ModelLoadError: the tokenizer has a decoder whose text cannot be streamed.
        """
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.known_ids = frozenset(vocabulary.values())
        decoder = _decoder(tokenizer)
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
        self.is_byte_level = kinds in ({"ByteLevel"}, {"ByteLevel", "Sequence"})
        strips_end = any(part.get("stop") for part in (decoder, *decoder.get("decoders", [])))
        if not kinds <= _SERVED_DECODERS or ("ByteLevel" in kinds and not self.is_byte_level) or strips_end:
            names = ", ".join(sorted(map(str, kinds - {"Sequence"})))
            raise ModelLoadError(f"the tokenizer's decoder ({names}) cannot be streamed; use the model's usual tokenizer.json")
        self._bytes: dict[int, bytes] = {}
        self.byte_ids: frozenset[int] = frozenset()
        if self.is_byte_level:
            self._bytes = {index: _alphabet_bytes(token) for token, index in vocabulary.items()}
        elif "ByteFallback" in kinds:
            found = ((index, _BYTE_TOKEN.fullmatch(token)) for token, index in vocabulary.items())
            self._bytes = {index: bytes.fromhex(match[1]) for index, match in found if match}
            self.byte_ids = frozenset(self._bytes)

    @cached_property
    def neutral_id(self) -> int:
        """A token that may stand before any other without changing its text, unless the other would be the first of all."""
        if self.byte_ids:
            # ASCII: in a run that is valid it is one character, in a spoilt one too.
            return next((index for index, data in self._bytes.items() if data.isascii()), min(self.byte_ids))
        usual = sorted(self.known_ids - self.special_ids) or sorted(self.known_ids)
        return next((index for index in usual if self._decode([index]).strip().isalnum()), usual[0])

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the bytes of a text, after others; ids that no vocabulary has add nothing."""
        data = self._bytes.get(token_id)
        if data is None and not self.is_byte_level and token_id in self.known_ids:
            data = self.text_of(token_id).encode()
        return data or b""

    def text_of(self, token_id: int) -> str:
        """The token as it is shown by itself: with its space, a special one by name, half a character as U+FFFD."""
        if token_id in self.special_ids:
            return str(self._tokenizer.id_to_token(token_id))
        if token_id in self._bytes:
            return self._bytes[token_id].decode(errors="replace")
        if token_id not in self.known_ids:
            return ""
        before = self._decode([self.neutral_id])
        return self._decode([self.neutral_id, token_id])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def _decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its state; of nested sequences, all parts."""
    state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    parts, flat = list(state.get("decoders", [])), []
    while parts:
        part = parts.pop(0)
        parts = part.get("decoders", []) + parts
        flat.append(part)
    return state | {"decoders": flat}


def _alphabet_bytes(token: str) -> bytes:
    """As the byte-level decoder does: by its alphabet, or the token's own UTF-8 if a character is not in it."""
    alphabet = byte_level_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()

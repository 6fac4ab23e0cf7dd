"""Text to token ids and back. Special tokens in a user's text are plain text: only the template can place real ones."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from tokenizers import Tokenizer

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelLoadError
from streamkv.text.detokenizer import byte_level_alphabet
from streamkv.text.template import ChatTemplate

__all__ = ["TextTokenizer", "load_tokenizer"]

_BYTES_PER_TOKEN: Final = 8
"""No text of a request that fits has more bytes per token of context than this; more is refused before it is tokenised."""

ROLES: Final = ("assistant", "developer", "system", "tool", "user")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

log = structlog.get_logger(__name__)


class TextTokenizer:
    """A `tokenizers` tokenizer with its chat template. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Take over a tokenizer.

        Args:
            special_tokens: names the template may use (`bos_token`, ...) and their text.
            max_tokens: the model's context; texts that cannot fit are refused before they are tokenised.
        """
        self._control, self._plain = _twins(tokenizer)
        self._template = template
        self._special_tokens = dict(special_tokens or {})
        self._max_bytes = None if max_tokens is None else _BYTES_PER_TOKEN * max_tokens
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        names = sorted((token.content for token in added.values() if token.special and token.content), key=len, reverse=True)
        self._special_text = re.compile("|".join(re.escape(name) for name in names)) if names else None
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.known_ids = frozenset(vocabulary.values())
        self.vocab_size = max(self.known_ids, default=-1) + 1
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
        self.is_byte_level = kinds in ({"ByteLevel"}, {"ByteLevel", "Sequence"})
        self.byte_ids: frozenset[int] = frozenset()
        self._bytes: dict[int, bytes] = {}
        if self.is_byte_level:
            self._bytes = {index: _token_bytes(token) for token, index in vocabulary.items()}
        elif "ByteFallback" in kinds:
            self.byte_ids = frozenset(index for token, index in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))

    @property
    def has_chat_template(self) -> bool:
        """True if `encode_chat` works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the tokenizer adds by itself (BOS).

        Raises:
            ContextLengthError: the text cannot fit the context, by its length in bytes.
        """
        self._bound(text, "prompt")
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation as the model's template writes it.

        Args:
            messages: objects with `role` and `content`, both strings.

        Raises:
            InvalidRequestError: the model has no template, these are no messages, or the template refuses them.
            ContextLengthError: the text cannot fit the context, by its length in bytes.
        """
        if self._template is None:
            raise InvalidRequestError("the model has no chat template; send a prompt instead of messages", param="messages")
        _check_messages(messages)
        self._bound("".join(message["content"] for message in messages), "messages")
        guarded, typed = self._guard(messages)
        text = self._template.render(guarded, add_generation_prompt=add_generation_prompt, special_tokens=self._special_tokens)
        ids: list[int] = []
        for piece in re.split(f"([{''.join(typed)}])", text) if typed else [text]:
            tokenizer = self._plain if piece in typed else self._control
            ids += tokenizer.encode(typed.get(piece, piece), add_special_tokens=False).ids
        return ids

    def _guard(self, messages: Sequence[Mapping[str, str]]) -> tuple[Sequence[Mapping[str, str]], dict[str, str]]:
        """Put one character in the place of every special token's text that somebody typed.

        A single character, because a template may cut, split and trim contents, and half a mark would guard nothing.

        Returns:
            The messages, and what each stand-in stands for: nothing, nearly always.
        """
        pattern = self._special_text
        contents = [message["content"] for message in messages]
        found = sorted({match for content in contents for match in pattern.findall(content)}) if pattern else []
        if pattern is None or not found:
            return messages, {}
        present = set().union(*contents)
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in present)  # private use: no template's text
        stand_in = dict(zip(found, free, strict=False))
        if len(stand_in) < len(found):
            raise InvalidRequestError("messages use every private-use character; leave one", param="messages")
        guarded = [
            {**message, "content": pattern.sub(lambda match: stand_in[match[0]], content)}
            for message, content in zip(messages, contents, strict=True)
        ]
        return guarded, {mark: name for name, mark in stand_in.items()}

    def _bound(self, text: str, param: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError("the text holds half a surrogate pair; send valid Unicode", param=param) from error
        if self._max_bytes is not None and size > self._max_bytes:
            raise ContextLengthError(f"the text has {size} bytes and cannot fit the context", param=param)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all these tokens."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        return self.decode_raw([token for token in token_ids if token not in skip])

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of all these tokens, special ones included."""
        text: str = self._control.decode(token_ids, skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text's bytes; only where `is_byte_level`. Unknown ids add nothing."""
        return self._bytes.get(token_id, b"")


def load_tokenizer(path: str | Path, *, max_tokens: int | None = None) -> TextTokenizer:
    """From a model folder: tokenizer.json, and the template of chat_template.jinja or tokenizer_config.json.

    Raises:
        ModelLoadError: the folder has no usable tokenizer.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelLoadError(f"{folder} has no tokenizer.json; only fast tokenizers are served")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        log.warning("tokenizer_load_failed", error=repr(error))
        raise ModelLoadError(f"{file} cannot be read as a tokenizer") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config_file = folder / "tokenizer_config.json"
    try:
        config: dict[str, Any] = dict(json.loads(config_file.read_text(encoding="utf-8"))) if config_file.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"{config_file} is no JSON object") from error
    template_file = folder / "chat_template.jinja"
    source = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    special = {name: _content(config[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(name)}
    return TextTokenizer(
        tokenizer,
        template=ChatTemplate(source) if isinstance(source, str) else None,
        special_tokens=special,
        max_tokens=max_tokens,
    )


def _content(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message", param="messages")
    for index, message in enumerate(messages):
        # A template may build a control token from the role ("<|" + role + "|>"), so that it is not free text.
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise InvalidRequestError(f"role must be one of {', '.join(ROLES)}", param=f"messages[{index}].role")
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
            raise InvalidRequestError("a message has role and content, and content is a string", param=f"messages[{index}]")


def _twins(tokenizer: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """(one that reads special tokens where their exact text stands, one that reads no special token at all).

    Two objects, because a flag on one would race between threads. The flag alone is not enough: Unigram and WordPiece find
    special tokens among their own pieces, so that the second one gets names for them which nobody can guess.
    """
    state = json.loads(tokenizer.to_str())
    special = [token for token in state["added_tokens"] if token["special"]]
    for token in special:
        token["normalized"] = False  # or what a normalizer makes of other text would be read as control
    control = Tokenizer.from_str(json.dumps(state))
    model, salt = state["model"], secrets.token_hex(16)
    vocabulary = model["vocab"]
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in model.get("merges", ())}
    hidden = {token["content"]: f"{salt}{token['id']}" for token in special}
    hidden = {name: cover for name, cover in hidden.items() if name != model.get("unk_token") and name not in merged}
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocabulary]
    for token in special:
        token["content"] = hidden.get(token["content"], token["content"])
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return control, plain


def _token_bytes(token: str) -> bytes:
    """As the byte-level decoder does: by its alphabet, or the token's own UTF-8 if a character is not in it."""
    alphabet = byte_level_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()

"""Text to token ids and back. Special tokens in a user's text are plain text: only the template can place real ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from tokenizers import Tokenizer

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelLoadError
from streamkv.text.chat import checked_messages, checked_tools
from streamkv.text.folder import read_text_files
from streamkv.text.guard import SpecialText, strings, twins
from streamkv.text.pieces import Pieces
from streamkv.text.template import ChatTemplate

__all__ = ["TextTokenizer", "load_tokenizer"]

_BYTES_PER_TOKEN: Final = 8
"""No text of a request that fits has more bytes per token of context than this; more is refused before it is tokenised."""

log = structlog.get_logger(__name__)


class TextTokenizer:
    """A `tokenizers` tokenizer with its chat template. Safe to use from several threads.

    Attributes:
        special_ids, known_ids, byte_ids, is_byte_level: see `Pieces`.
        vocab_size: one more than the largest token id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        tool_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Take over a tokenizer.

        Args:
            tool_template: the template for conversations with tools, if it is another one.
            special_tokens: names the template may use (`bos_token`, ...) and their text.
            max_tokens: the model's context; texts that cannot fit are refused before they are tokenised.

        Raises:
            ModelLoadError: the tokenizer's text cannot be streamed.
        """
        self._control, self._plain = twins(tokenizer)
        self._template = template
        self._tool_template = tool_template or template
        self._special_tokens = dict(special_tokens or {})
        self._max_tokens = max_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._special_text = SpecialText(token.content for token in added.values() if token.special)
        self._pieces = Pieces(self._control)
        self.special_ids, self.known_ids = self._pieces.special_ids, self._pieces.known_ids
        self.byte_ids, self.is_byte_level = self._pieces.byte_ids, self._pieces.is_byte_level
        self.vocab_size = max(self.known_ids, default=-1) + 1

    # -- in -----------------------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        """True if `encode_chat` works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the tokenizer adds by itself (BOS).

        Raises:
            ContextLengthError: the text cannot fit the context, by its length in bytes.
        """
        self._bound([text], "prompt")
        return _encoded(self._plain, text, "prompt")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation as the model's template writes it.

        Args:
            messages: OpenAI's messages: `role`, `content`, and `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
            tools: OpenAI's tools; None or empty = none.

        Raises:
            InvalidRequestError: the model has no template, these are no messages or tools, or the template refuses them.
            ContextLengthError: the text cannot fit the context, by its length in bytes.
        """
        template = self._tool_template if tools else self._template
        if template is None:
            raise InvalidRequestError("the model has no chat template; send a prompt instead of messages", param="messages")
        talk, offered = checked_messages(messages), checked_tools(tools or [])
        self._bound(strings(talk), "messages")
        self._bound(strings([talk, offered]), "tools")
        (talk, offered), typed = self._special_text.guard(talk, offered)
        text = template.render(
            talk, tools=offered, add_generation_prompt=add_generation_prompt, special_tokens=self._special_tokens
        )
        ids: list[int] = []
        for piece in re.split(f"([{''.join(typed)}])", text) if typed else [text]:
            tokenizer = self._plain if piece in typed else self._control
            ids += _encoded(tokenizer, typed.get(piece, piece), "messages", add_special_tokens=False)
        return ids

    def encode_more(self, text: str) -> list[int]:
        """Token ids of text that follows other tokens: nothing is added by itself, no space is made up at the border.

        Raises:
            ContextLengthError: the text cannot fit the context, by its length in bytes.
        """
        self._bound([text], "prompt")
        line, after = self._ids("\n"), self._ids("\n" + text)
        return list(after[len(line) :] if after[: len(line)] == line else self._ids(text))

    def bad_word_ids(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token sequences that a word is written with: by itself, after a space, and right after another character."""
        word = word.strip() or word
        line = self._ids("\n")
        after = self._ids("\n" + word)
        inside = after[len(line) :] if after[: len(line)] == line else ()
        found = (self._ids(word), self._ids(" " + word), inside)
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(_encoded(self._plain, text, "prompt", add_special_tokens=False))

    def _bound(self, texts: Iterable[str], param: str) -> None:
        size = 0
        for text in texts:
            try:
                size += len(text.encode())
            except UnicodeEncodeError as error:
                raise InvalidRequestError("the text holds half a surrogate pair; send valid Unicode", param=param) from error
        if self._max_tokens is not None and size > _BYTES_PER_TOKEN * self._max_tokens:
            raise ContextLengthError.of(self._max_tokens, f"a text of {size} bytes is more", param=param)

    # -- out ----------------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all these tokens."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        return self.decode_raw([token for token in token_ids if token not in skip])

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of all these tokens, special ones included."""
        text: str = self._control.decode(token_ids, skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> str:
        """A token as it is shown by itself: with its space, a special one by name, half a character as U+FFFD."""
        return self._pieces.text_of(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text's bytes, after others. Ids that no vocabulary has add nothing."""
        return self._pieces.bytes_of(token_id)

    @property
    def neutral_id(self) -> int:
        """A token that may stand before any other without changing its text, unless the other would be the first of all."""
        return self._pieces.neutral_id


def _encoded(tokenizer: Tokenizer, text: str, param: str, **options: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        InvalidRequestError: the tokenizer gives up on it; a pattern that runs away does, and must end only this request.
    """
    try:
        ids: list[int] = tokenizer.encode(text, **options).ids
    except BaseException as error:
        # The library's panics are no `Exception`; what really is none, such as an interrupt, goes on.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        log.warning("tokenizer_failed", error=repr(error)[:200])
        raise InvalidRequestError("the model's tokenizer cannot read this text", param=param) from None
    return ids


def load_tokenizer(path: str | Path, *, max_tokens: int | None = None) -> TextTokenizer:
    """From a model folder: tokenizer.json, or what came before it (docs/text.md), with its chat templates.

    Raises:
        ModelLoadError: the folder has no usable tokenizer or template.
    """
    files = read_text_files(Path(path))
    templates = {name: ChatTemplate(files.templates[name]) for name in ("default", "tool_use") if name in files.templates}
    if files.templates and not templates:
        raise ModelLoadError(f"{path} has chat templates, but none named default")
    return TextTokenizer(
        files.tokenizer,
        template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        special_tokens=files.special_tokens,
        max_tokens=max_tokens,
    )

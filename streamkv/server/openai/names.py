"""How single tokens are shown in log-probabilities: OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from streamkv.sampling_params import TokenLogprobs
from streamkv.server.openai.shapes import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobEntries,
    TopLogprob,
)
from streamkv.text.detokenizer import IncrementalDetokenizer
from streamkv.text.tokenizer import TextTokenizer

__all__ = ["Offsets", "TokenNames"]

_LEAST = -9999.0
"""What OpenAI says instead of minus infinity, which JSON does not have."""
_MAX_NAMES = 65_536


class TokenNames:
    """Writes log-probabilities. Keeps the names of tokens that were asked for, up to a bound."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._completion_name = lru_cache(maxsize=_MAX_NAMES)(self._find_completion_name)
        self._chat_name = lru_cache(maxsize=_MAX_NAMES)(self._find_chat_name)

    def _find(self, token_id: int) -> tuple[str | None, bytes]:
        """(text, or None if the token is no whole character; bytes)."""
        data = self.tokenizer.token_bytes(token_id)
        if token_id in self.tokenizer.special_ids:
            name = self.tokenizer.token_text(token_id)
            return name, name.encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return None, data

    def chat(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """As in chat completions."""
        return ChatLogprobs([self._chat_entry(token_id, entry) for token_id, entry in zip(token_ids, logprobs, strict=True)])

    def _chat_entry(self, token_id: int, entry: TokenLogprobs) -> ChatTokenLogprob:
        name, data = self._chat_name(token_id)
        top = [TopLogprob(other, _finite(value), its) for (other, its), value in ((self._chat_name(i), v) for i, v in entry.top)]
        return ChatTokenLogprob(name, _finite(entry.chosen), data, top)

    def _find_chat_name(self, token_id: int) -> tuple[str, list[int]]:
        text, data = self._find(token_id)
        return ("".join(f"\\x{byte:02x}" for byte in data) if text is None else text), list(data)

    def completion(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """As in text completions; None = nothing comes before the token."""
        result = CompletionLogprobs([], [], [], list(offsets))
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            name = self._completion_name(token_id)
            result.tokens.append(name)
            result.token_logprobs.append(None if entry is None else _finite(entry.chosen))
            result.top_logprobs.append(None if entry is None else self._top(name, entry))
        return result

    def _top(self, name: str, entry: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the one that stands there; of two that are shown alike, the more probable."""
        top: dict[str, float] = {}
        for other, value in entry.top:
            top.setdefault(self._completion_name(other), _finite(value))
        top.setdefault(name, _finite(entry.chosen))
        return top

    def _find_completion_name(self, token_id: int) -> str:
        text, data = self._find(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if text is None else text

    def prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> PromptLogprobEntries:
        """As vLLM's `prompt_logprobs`."""
        entries: PromptLogprobEntries = [None]
        for token_id, entry in zip(token_ids[1:], logprobs, strict=True):
            ranked = {other: (value, rank) for rank, (other, value) in enumerate(entry.top, 1)}
            ranked[token_id] = (entry.chosen, entry.rank)
            entries.append(
                {
                    str(other): PromptLogprob(_finite(value), rank or None, self.tokenizer.token_text(other))
                    for other, (value, rank) in ranked.items()
                }
            )
        return entries


class Offsets:
    """Where in a text each of its tokens begins, in characters. A token in the middle of a character begins where that does."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, start: int = 0, after: Sequence[int] = ()) -> None:
        """`after`: the tokens before the text's first one."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=after)
        self._next = start

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Offsets of the next tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._next)
            self._next += len(self._detokenizer.push((token_id,)))
        return offsets


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)

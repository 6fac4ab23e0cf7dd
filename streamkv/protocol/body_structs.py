"""What may stand in a request's body: OpenAI's field names, and those that vLLM's users know. None = not given.

Unknown fields are tolerated, because SDKs send them. A field whose name is known and whose effect is not to be had here is
declared all the same, so that it is refused and not silently ignored: see `REFUSED`.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

__all__ = [
    "REFUSED",
    "ChatBody",
    "ChatMessage",
    "CompletionBody",
    "EmbeddingBody",
    "GenerationBody",
    "Input",
    "ScoreBody",
    "TextPart",
]

Input = str | list[int]
"""A text, or token ids."""


class TextPart(msgspec.Struct):
    """A part of a message's content. There are no other kinds here."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a template sees it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        rest = {name: getattr(self, name) for name in ("name", "tool_calls", "tool_call_id", "reasoning_content")}
        return {"role": self.role, "content": text} | {name: value for name, value in rest.items() if value is not None}


class _Refused(msgspec.Struct, kw_only=True):
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    response_format: Any = None
    truncate_prompt_tokens: int | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    spaces_between_special_tokens: bool | None = None


class GenerationBody(_Refused, kw_only=True):
    """What all generating APIs share."""

    model: str | None = None
    cache_salt: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    bad_words: str | list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logits_processors: dict[str, Any] | None = None
    n: int | None = None


class ChatBody(GenerationBody, kw_only=True):
    """A conversation to be continued. `tool_choice` "none" leaves the tools out of the prompt."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[Any] | None = None
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: list[Any] | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """A prompt to be continued: a text, token ids, or a list of exactly one of these."""

    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    suffix: str | None = None
    add_special_tokens: bool | None = None


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """OpenAI's body and `pooling`."""

    model: str | None = None
    input: str | list[Any]
    pooling: str | None = None


class ScoreBody(msgspec.Struct, kw_only=True):
    """Texts and what comes before each of them."""

    model: str | None = None
    input: str | list[Any]
    prompt: Input | None = None
    logprobs: int | None = None


_SHARED: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
}

REFUSED: Final[dict[type[GenerationBody], dict[str, tuple[Any, ...]]]] = {
    ChatBody: _SHARED
    | {
        "tool_choice": ("auto", "none"),
        "functions": ([],),
        "function_call": ("auto", "none"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    },
    CompletionBody: _SHARED | {"suffix": ("",), "add_special_tokens": (True,)},
}
"""Fields that would change the answer and are not served -> values that change nothing, which are accepted.

`parallel_tool_calls` matters only beside tools and is looked at with them.
"""

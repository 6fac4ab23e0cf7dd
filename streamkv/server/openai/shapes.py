"""What the door answers, field by field as OpenAI's API has it. Structs are encoded, and described in /openapi.json."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessageOut",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Embedding",
    "EmbeddingList",
    "EmbeddingUsage",
    "ErrorBody",
    "ErrorDetail",
    "Finish",
    "Head",
    "Model",
    "ModelList",
    "PromptLogprob",
    "PromptLogprobEntries",
    "PromptTokensDetails",
    "Tier",
    "TopLogprob",
    "Usage",
]

Finish = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens` of the prompt came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all choices; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    """vLLM's form: one token that could have stood in the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


class Head(TypedDict):
    """What an answer and all of its events have in common.

    `created` is Unix time in seconds. `system_fingerprint` changes whenever equal seeds may give other texts: with the weights,
    the backend, the server's version.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


Tier = Literal["default"] | UnsetType
"""The only one; told to who has sent a `service_tier`."""


PromptLogprobEntries = list[dict[str, PromptLogprob] | None]
"""One entry per prompt token, by token id; the first is null: nothing comes before it."""


# -- chat -------------------------------------------------------------------------------------------------------------


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    r"""A token. `bytes` is its part of the text in UTF-8; a token that is no whole character is shown as `\xNN`."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """A sampled token, and the most probable ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry per generated token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True):
    """What is new of a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(_Answer, frozen=True):
    """One event of a stream."""

    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: Tier = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ChatMessageOut(msgspec.Struct, frozen=True):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One sample."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(_Answer, frozen=True):
    """A whole answer."""

    choices: list[ChatChoice]
    usage: Usage
    service_tier: Tier = UNSET
    prompt_logprobs: PromptLogprobEntries | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


# -- text completions -------------------------------------------------------------------------------------------------


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Four lists with one entry per token; `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One sample, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    prompt_logprobs: PromptLogprobEntries | UnsetType = UNSET


class Completion(_Answer, frozen=True):
    """A whole answer, or one event of a stream."""

    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


# -- the rest ---------------------------------------------------------------------------------------------------------


class Model(msgspec.Struct, frozen=True):
    """A model; `max_model_len` is vLLM's: most tokens of prompt and answer."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: Literal["streamkv"] = "streamkv"


class ModelList(msgspec.Struct, frozen=True):
    """All models, which is one."""

    data: list[Model]
    object: Literal["list"] = "list"


class Embedding(msgspec.Struct, frozen=True):
    """One input's vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    """Vectors in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class ErrorDetail(msgspec.Struct, frozen=True):
    """`code` is one of docs/protocol.md; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """Every refusal."""

    error: ErrorDetail

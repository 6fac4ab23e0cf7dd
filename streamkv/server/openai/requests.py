"""From an HTTP request to what is wished for: JSON within bounds, fields checked, nothing tokenised yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET

from streamkv.engine.api import EngineInfo
from streamkv.errors import InvalidRequestError
from streamkv.protocol.bodies import ParsedBody, check_body, decode_body, prompts_of
from streamkv.protocol.body_structs import ChatBody, CompletionBody, EmbeddingBody
from streamkv.server.openai.shapes import Tier
from streamkv.server.principal import Principal, principal_of
from streamkv.text.prepare import Prompt

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "StreamOptions",
    "UsageWish",
    "check_generation",
    "check_priority",
    "read_body",
]

DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's `max_tokens` of a text completion that says nothing."""
MAX_PROMPTS: Final = 128

T = TypeVar("T")

UsageWish = Literal["none", "last", "each"]
"""Which chunks of a stream tell the usage: none, one of its own at the end, or every one."""


class StreamOptions(msgspec.Struct):
    """`continuous_usage_stats` is vLLM's: with `include_usage`, every chunk has the usage so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatCompletionRequest(ChatBody, kw_only=True):
    """OpenAI's chat completion; further sampling parameters as in vLLM."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    service_tier: str | None = None


class CompletionRequest(CompletionBody, kw_only=True):
    """OpenAI's text completion; further sampling parameters as in vLLM."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None


class EmbeddingRequest(EmbeddingBody, kw_only=True):
    """OpenAI's embeddings; vectors have length 1 unless `normalize` is false."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be generated, and how it is to be delivered.

    Attributes:
        prompts: of a chat, its one conversation.
        tier: what the answer says of it.
    """

    body: ParsedBody
    prompts: Sequence[Prompt]
    tier: Tier
    stream: bool
    usage: UsageWish
    priority: int
    principal: Principal
    salt: str


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The JSON body of a POST. The guard has read it, within its bounds.

    Raises:
        InvalidRequestError: it is no JSON object, or a field has the wrong type.
    """
    return decode_body(await request.read(), kind)


def check_generation(
    request: web.Request, given: ChatCompletionRequest | CompletionRequest, info: EngineInfo
) -> GenerationRequest:
    """Check every field.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    stream = bool(given.stream)
    usage = _usage_wish(given.stream_options, stream)
    prompts: Sequence[Prompt] = []
    if isinstance(given, CompletionRequest):
        prompts = prompts_of(given.prompt)
        if len(prompts) > MAX_PROMPTS:
            raise InvalidRequestError(f"there are {len(prompts)} prompts; send at most {MAX_PROMPTS}", param="prompt")
        given.prompt = prompts[0]  # type: ignore[assignment]  # a list is invariant
        if given.max_tokens is None and given.max_completion_tokens is None:
            given.max_tokens = DEFAULT_COMPLETION_TOKENS
    body = check_body(given, models=(info.model,), num_ids=None, max_model_len=info.max_model_len)
    assert isinstance(body, ParsedBody)
    if stream and body.params.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs comes with whole answers only; leave stream out", param="prompt_logprobs")
    principal = principal_of(request)
    salt = principal.salt_with(body.cache_salt)
    tier: Tier = "default" if isinstance(given, ChatCompletionRequest) and given.service_tier is not None else UNSET
    prompts = prompts or [body.prompt]
    return GenerationRequest(body, prompts, tier, stream, usage, check_priority(given.priority), principal, salt)


def _usage_wish(options: StreamOptions | None, stream: bool) -> UsageWish:
    if options is None:
        return "none"
    if not stream:
        raise InvalidRequestError("stream_options is allowed only with stream true", param="stream_options")
    if not options.include_usage:
        return "none"
    return "each" if options.continuous_usage_stats else "last"


def check_priority(priority: int | None) -> int:
    """Lower comes first, if the server schedules by priority.

    Raises:
        InvalidRequestError: it is no 32-bit integer.
    """
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise InvalidRequestError("priority must be a 32-bit integer", param="priority")
    return priority or 0

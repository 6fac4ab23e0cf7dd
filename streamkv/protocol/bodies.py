"""Bodies of `create` and of HTTP requests, read and checked before anything is tokenised or copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from streamkv.protocol.body_structs import (
    REFUSED,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    Input,
    ScoreBody,
)
from streamkv.protocol.messages import Codec
from streamkv.sampling_params import MAX_LOGPROBS, POOLINGS, Pooling, SamplingParams

__all__ = [
    "APIS",
    "MAX_MESSAGES",
    "MAX_SALT_CHARS",
    "ROLES",
    "Body",
    "Parsed",
    "ParsedBody",
    "ParsedEmbedding",
    "ParsedScore",
    "check_body",
    "decode_body",
    "parse_body",
    "prompts_of",
    "validation_error",
]

ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_SALT_CHARS: Final = 256
MAX_MESSAGES: Final = 1024
_MAX_ERROR_CHARS: Final = 200

T = TypeVar("T")

Body = GenerationBody | EmbeddingBody | ScoreBody


APIS: Final[dict[str, type[GenerationBody | EmbeddingBody | ScoreBody]]] = {
    "chat": ChatBody,
    "completions": CompletionBody,
    "embeddings": EmbeddingBody,
    "score": ScoreBody,
}

_PASSED_ON: Final = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_token_ids",
    "bad_words",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "logits_processors",
)
"""Fields that `SamplingParams` has under the same name, and checks."""


class ParsedBody(msgspec.Struct, frozen=True):
    """A body whose fields are all within their bounds; what depends on the model is still to be checked."""

    prompt: Input | Sequence[Mapping[str, Any]]
    params: SamplingParams
    is_chat: bool
    tools: Sequence[Mapping[str, Any]] | None = None
    cache_salt: str | None = None


class ParsedEmbedding(msgspec.Struct, frozen=True):
    """One vector per input; one input per stream."""

    inputs: tuple[Input, ...]
    pooling: Pooling


class ParsedScore(msgspec.Struct, frozen=True):
    """The probability of each input after `prompt`; one input per stream."""

    inputs: tuple[Input, ...]
    prompt: Input | None
    logprobs: int | None


Parsed = ParsedBody | ParsedEmbedding | ParsedScore


def parse_body(
    api: str, raw: msgspec.Raw, codec: Codec, *, models: Sequence[str], num_ids: int | None, max_model_len: int
) -> Parsed:
    """Read and check the body of a `create`.

    Args:
        num_ids: how many streams the `create` names; `n`, or the number of inputs, must agree. None = what the body says.
        max_model_len: most tokens of a request; what can be told without tokenising is told here.

    Raises:
        InvalidRequestError: with the path of the field at fault in `param`.
    """
    kind = APIS.get(api)
    if kind is None:
        raise InvalidRequestError(f"api must be one of {', '.join(APIS)}", param="api")
    try:
        body = decode_body(raw, kind, text=codec.text)
        return check_body(body, models=models, num_ids=num_ids, max_model_len=max_model_len)
    except InvalidRequestError as error:
        raise type(error)(error.message, param=f"body.{error.param}" if error.param else "body") from error


def decode_body(raw: bytes | msgspec.Raw, kind: type[T], *, text: bool = True) -> T:
    """Read JSON (or MessagePack) into a struct.

    Raises:
        InvalidRequestError: it cannot be read, or a field has the wrong type.
    """
    try:
        return (msgspec.json.decode if text else msgspec.msgpack.decode)(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise validation_error(error) from error


def check_body(body: Body, *, models: Sequence[str], num_ids: int | None, max_model_len: int) -> Parsed:
    """Check the fields of a body that has been read; for the rest see `parse_body`."""
    if body.model is not None and body.model not in models:
        raise ModelNotFoundError(f"this server serves {', '.join(models)}", param="model")
    if isinstance(body, EmbeddingBody):
        wanted = "last" if body.pooling is None else body.pooling
        pooling = next((known for known in POOLINGS if known == wanted), None)
        if pooling is None:
            raise InvalidRequestError(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
        return ParsedEmbedding(_inputs(body.input, num_ids), pooling)
    if isinstance(body, ScoreBody):
        if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}", param="logprobs")
        return ParsedScore(_inputs(body.input, num_ids), body.prompt, body.logprobs)
    if body.n is not None and num_ids is not None and body.n != num_ids:
        raise InvalidRequestError(f"n must be absent or equal the number of ids ({num_ids})", param="n")
    samples = num_ids if num_ids is not None else 1 if body.n is None else body.n
    _check_refused(body)
    if isinstance(body, ChatBody):
        params = _params(body, _chat_logprobs(body), samples, max_model_len)
        return ParsedBody(_messages(body), params, is_chat=True, tools=_tools(body), cache_salt=_salt(body))
    assert isinstance(body, CompletionBody)
    prompt = _prompt(body.prompt)
    params = _params(body, body.logprobs, samples, max_model_len, echo=bool(body.echo))
    return ParsedBody(prompt, params, is_chat=False, cache_salt=_salt(body))


def _salt(body: GenerationBody) -> str | None:
    """Divides a tenant's own part of the prefix cache further."""
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= MAX_SALT_CHARS:
        raise InvalidRequestError(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters", param="cache_salt")
    return body.cache_salt


def _check_refused(body: GenerationBody) -> None:
    """A field that would change the answer, and does not here, is refused; one that says what is done anyway is not."""
    for name, harmless in next(fields for kind, fields in REFUSED.items() if isinstance(body, kind)).items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            but = " or ".join(json.dumps(known) for known in harmless)
            raise InvalidRequestError(f"{name} is not served; leave it out" + (f", or send {but}" if but else ""), param=name)


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    if body.parallel_tool_calls is False:
        message = "parallel_tool_calls false is not served: nothing keeps the model from several calls; leave it out"
        raise InvalidRequestError(message, param="parallel_tool_calls")
    return None if body.tool_choice == "none" else body.tools


def prompts_of(given: str | list[int | str | list[int]]) -> list[Input]:
    """The prompts that a completion's body names.

    Raises:
        InvalidRequestError: one of them is empty, or none, or token ids stand beside texts.
    """
    ids = [item for item in given if isinstance(item, int)] if isinstance(given, list) else []
    prompts = [given] if isinstance(given, str) else [ids] if len(ids) == len(given) else given
    found: list[Input] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, int):
            raise InvalidRequestError("prompt has a token id beside other things; give each list of ids its own", param="prompt")
        if not prompt:
            name = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
            raise InvalidRequestError("prompt is empty; send at least one token", param=name)
        found.append(prompt)
    return found


def _prompt(given: str | list[int | str | list[int]]) -> Input:
    """The one prompt of a request."""
    prompts = prompts_of(given)
    if len(prompts) > 1:
        message = f"prompt is a list of {len(prompts)}; send one prompt (a text, or token ids) in each request"
        raise InvalidRequestError(message, param="prompt")
    return prompts[0]


def _inputs(given: str | list[Any], num_ids: int | None) -> tuple[Input, ...]:
    """One text, one list of token ids, or a list of these."""
    several = isinstance(given, list) and not all(isinstance(item, int) for item in given)
    inputs = given if several and isinstance(given, list) else [given]
    for index, item in enumerate(inputs):
        ids = isinstance(item, list) and all(type(token_id) is int for token_id in item)
        if not (isinstance(item, str) or ids) or not item:
            name = f"input[{index}]" if several else "input"
            raise InvalidRequestError("each input is a text or a list of token ids, and not empty", param=name)
    if num_ids is not None and len(inputs) != num_ids:
        raise InvalidRequestError(f"there are {len(inputs)} inputs and {num_ids} ids; give one id per input", param="input")
    return tuple(inputs)


def _messages(body: ChatBody) -> list[dict[str, Any]]:
    if not 1 <= len(body.messages) <= MAX_MESSAGES:
        raise InvalidRequestError(f"messages must hold 1 to {MAX_MESSAGES} messages", param="messages")
    for index, message in enumerate(body.messages):
        if message.role not in ROLES:
            raise InvalidRequestError(f"role must be one of {', '.join(sorted(ROLES))}", param=f"messages[{index}].role")
    return [message.plain() for message in body.messages]


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise InvalidRequestError("top_logprobs must be an integer from 0 to 20", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _params(
    body: GenerationBody, logprobs: int | None, num_ids: int, max_model_len: int, *, echo: bool = False
) -> SamplingParams:
    params = _checked_params(body, logprobs, num_ids, echo)
    if params.max_tokens is not None and params.max_tokens >= max_model_len:
        raise ContextLengthError.of(
            max_model_len,
            f"at least one token of prompt and {params.max_tokens} to generate are more",
            param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        )
    return params


def _checked_params(body: GenerationBody, logprobs: int | None, num_ids: int, echo: bool) -> SamplingParams:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequestError("give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
    given = {name: getattr(body, name) for name in _PASSED_ON}
    try:
        return SamplingParams(
            n=num_ids,
            max_tokens=body.max_tokens if body.max_tokens is not None else body.max_completion_tokens,
            logprobs=logprobs,
            echo=echo,
            **{name: value for name, value in given.items() if value is not None},
        )
    except InvalidRequestError as error:
        if error.param == "max_tokens" and body.max_completion_tokens is not None:
            raise InvalidRequestError(error.message, param="max_completion_tokens") from error
        raise


def validation_error(error: Exception, prefix: str = "") -> InvalidRequestError:
    """Msgspec's message with the path taken out of it: `Expected `float`, got `str` - at `$.top_p``."""
    text, _, path = str(error).partition(" - at `")
    if isinstance(error, RecursionError):
        text = "the message is nested too deeply"
    elif not isinstance(error, msgspec.ValidationError):
        text = "the message is malformed"
    # `$.stop[0]`, or `key` in `$` for a key that is no text.
    path = path.rpartition("$")[2].rstrip("`").lstrip(".")
    _, missing, field = text.partition("missing required field ")
    parts = (prefix, path, field.strip("`") if missing else "")
    param = ".".join(part for part in parts if part).replace(".[", "[")
    # It may quote what the client sent, at any length.
    return InvalidRequestError(text.replace("`", "")[:_MAX_ERROR_CHARS], param=param or None)

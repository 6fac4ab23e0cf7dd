"""Bodies of `create`: OpenAI's field names, checked before anything is tokenised or copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, StreamKVError
from streamkv.protocol.messages import Codec
from streamkv.sampling_params import MAX_LOGPROBS, POOLINGS, Pooling, SamplingParams

__all__ = ["APIS", "Parsed", "ParsedBody", "ParsedEmbedding", "ParsedScore", "parse_body", "validation_error"]

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_MESSAGES: Final = 1024
_MAX_ERROR_CHARS: Final = 200

T = TypeVar("T")


class _TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | list[_TextPart] | None = None
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


class _Body(msgspec.Struct):
    """What all generating APIs share. None = not given, as in OpenAI's API."""

    model: str | None = None
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


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]
    tools: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[int]
    echo: bool | None = None
    logprobs: int | None = None


Input = str | list[int]


class _EmbeddingBody(msgspec.Struct, kw_only=True):
    """OpenAI's body and `pooling`; as many inputs as the `create` has ids."""

    model: str | None = None
    input: str | list[Any]
    pooling: str | None = None


class _ScoreBody(msgspec.Struct, kw_only=True):
    """Texts and what comes before each of them; as many inputs as the `create` has ids."""

    model: str | None = None
    input: str | list[Any]
    prompt: Input | None = None
    logprobs: int | None = None


APIS: Final[dict[str, type[_Body | _EmbeddingBody | _ScoreBody]]] = {
    "chat": _ChatBody,
    "completions": _CompletionBody,
    "embeddings": _EmbeddingBody,
    "score": _ScoreBody,
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


def parse_body(api: str, raw: msgspec.Raw, codec: Codec, *, models: Sequence[str], num_ids: int, max_model_len: int) -> Parsed:
    """Check a body.

    Args:
        num_ids: how many streams the `create` names; `n`, or the number of inputs, must agree.
        max_model_len: most tokens of a request; what can be told without tokenising is told here.

    Raises:
        InvalidRequestError: with the path of the field at fault in `param`.
    """
    kind = APIS.get(api)
    if kind is None:
        raise InvalidRequestError(f"api must be one of {', '.join(APIS)}", param="api")
    try:
        decode = msgspec.json.decode if codec.text else msgspec.msgpack.decode
        body: _Body | _EmbeddingBody | _ScoreBody = decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise validation_error(error, "body") from error
    if body.model is not None and body.model not in models:
        raise ModelNotFoundError(f"this server serves {', '.join(models)}", param="body.model")
    try:
        return _parse(body, num_ids, max_model_len)
    except StreamKVError as error:
        raise type(error)(error.message, param=f"body.{error.param}" if error.param else "body") from error


def _parse(body: _Body | _EmbeddingBody | _ScoreBody, num_ids: int, max_model_len: int) -> Parsed:
    if isinstance(body, _EmbeddingBody):
        wanted = "last" if body.pooling is None else body.pooling
        pooling = next((known for known in POOLINGS if known == wanted), None)
        if pooling is None:
            raise InvalidRequestError(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
        return ParsedEmbedding(_inputs(body.input, num_ids), pooling)
    if isinstance(body, _ScoreBody):
        if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}", param="logprobs")
        return ParsedScore(_inputs(body.input, num_ids), body.prompt, body.logprobs)
    if body.n is not None and body.n != num_ids:
        raise InvalidRequestError(f"n must be absent or equal the number of ids ({num_ids})", param="n")
    if isinstance(body, _ChatBody):
        params = _params(body, _chat_logprobs(body), num_ids, max_model_len)
        return ParsedBody(_messages(body), params, is_chat=True, tools=body.tools or None)
    assert isinstance(body, _CompletionBody)
    if not body.prompt:
        raise InvalidRequestError("prompt is empty; send at least one token", param="prompt")
    return ParsedBody(body.prompt, _params(body, body.logprobs, num_ids, max_model_len, echo=bool(body.echo)), is_chat=False)


def _inputs(given: str | list[Any], num_ids: int) -> tuple[Input, ...]:
    """One text, one list of token ids, or a list of these."""
    several = isinstance(given, list) and not all(isinstance(item, int) for item in given)
    inputs = given if several and isinstance(given, list) else [given]
    for index, item in enumerate(inputs):
        ids = isinstance(item, list) and all(type(token_id) is int for token_id in item)
        if not (isinstance(item, str) or ids) or not item:
            name = f"input[{index}]" if several else "input"
            raise InvalidRequestError("each input is a text or a list of token ids, and not empty", param=name)
    if len(inputs) != num_ids:
        raise InvalidRequestError(f"there are {len(inputs)} inputs and {num_ids} ids; give one id per input", param="input")
    return tuple(inputs)


def _messages(body: _ChatBody) -> list[dict[str, Any]]:
    if not 1 <= len(body.messages) <= _MAX_MESSAGES:
        raise InvalidRequestError(f"messages must hold 1 to {_MAX_MESSAGES} messages", param="messages")
    for index, message in enumerate(body.messages):
        if message.role not in _ROLES:
            raise InvalidRequestError(f"role must be one of {', '.join(sorted(_ROLES))}", param=f"messages[{index}].role")
    return [message.plain() for message in body.messages]


def _chat_logprobs(body: _ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise InvalidRequestError("top_logprobs must be an integer from 0 to 20", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _params(body: _Body, logprobs: int | None, num_ids: int, max_model_len: int, *, echo: bool = False) -> SamplingParams:
    params = _checked_params(body, logprobs, num_ids, echo)
    if params.max_tokens is not None and params.max_tokens >= max_model_len:
        raise ContextLengthError(
            f"at least one token of prompt and {params.max_tokens} to generate exceed the context of {max_model_len}",
            param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        )
    return params


def _checked_params(body: _Body, logprobs: int | None, num_ids: int, echo: bool) -> SamplingParams:
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

"""Bodies of `create`: OpenAI's field names, checked before anything is tokenised or copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, StreamKVError
from streamkv.protocol.messages import Codec
from streamkv.sampling_params import SamplingParams

__all__ = ["APIS", "ParsedBody", "parse_body", "validation_error"]

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_MESSAGES: Final = 1024
_MAX_ERROR_CHARS: Final = 200

T = TypeVar("T")


class _TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | list[_TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """As a template sees it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": self.role, "content": text}


class _Body(msgspec.Struct):
    """What both APIs share. None = not given, as in OpenAI's API."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[int]
    logprobs: int | None = None


APIS: Final[dict[str, type[_Body]]] = {"chat": _ChatBody, "completions": _CompletionBody}


class ParsedBody(msgspec.Struct, frozen=True):
    """A body whose fields are all within their bounds; what depends on the model is still to be checked."""

    prompt: str | list[int] | Sequence[Mapping[str, Any]]
    params: SamplingParams
    is_chat: bool


def parse_body(
    api: str, raw: msgspec.Raw, codec: Codec, *, models: Sequence[str], num_ids: int, max_model_len: int
) -> ParsedBody:
    """Check a body.

    Args:
        num_ids: how many streams the `create` names; `n` must agree.
        max_model_len: most tokens of a request; what can be told without tokenising is told here.

    Raises:
        InvalidRequestError: with the path of the field at fault in `param`.
    """
    kind = APIS.get(api)
    if kind is None:
        raise InvalidRequestError(f"api must be one of {', '.join(APIS)}", param="api")
    try:
        decode = msgspec.json.decode if codec.text else msgspec.msgpack.decode
        body: _Body = decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise validation_error(error, "body") from error
    if body.model is not None and body.model not in models:
        raise ModelNotFoundError(f"this server serves {', '.join(models)}", param="body.model")
    if body.n is not None and body.n != num_ids:
        raise InvalidRequestError(f"n must be absent or equal the number of ids ({num_ids})", param="body.n")
    try:
        if isinstance(body, _ChatBody):
            return ParsedBody(_messages(body), _params(body, _chat_logprobs(body), num_ids, max_model_len), is_chat=True)
        assert isinstance(body, _CompletionBody)
        if not body.prompt:
            raise InvalidRequestError("prompt is empty; send at least one token", param="prompt")
        return ParsedBody(body.prompt, _params(body, body.logprobs, num_ids, max_model_len), is_chat=False)
    except StreamKVError as error:
        raise type(error)(error.message, param=f"body.{error.param}" if error.param else "body") from error


def _messages(body: _ChatBody) -> list[dict[str, str]]:
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


def _params(body: _Body, logprobs: int | None, num_ids: int, max_model_len: int) -> SamplingParams:
    params = _checked_params(body, logprobs, num_ids)
    if params.max_tokens is not None and params.max_tokens >= max_model_len:
        raise ContextLengthError(
            f"at least one token of prompt and {params.max_tokens} to generate exceed the context of {max_model_len}",
            param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        )
    return params


def _checked_params(body: _Body, logprobs: int | None, num_ids: int) -> SamplingParams:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequestError("give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
        "skip_special_tokens": body.skip_special_tokens,
    }
    try:
        return SamplingParams(
            n=num_ids,
            max_tokens=body.max_tokens if body.max_tokens is not None else body.max_completion_tokens,
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=logprobs,
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

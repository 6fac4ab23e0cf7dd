"""What `create` and `fork` ask for, read and checked. Nothing here knows which streams there are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from streamkv.errors import InvalidRequestError
from streamkv.protocol import messages as m
from streamkv.protocol.bodies import Parsed, ParsedBody, parse_body
from streamkv.sampling_params import MAX_N

__all__ = ["Request", "Served", "check_numbers", "ids_of", "is_id", "read_create", "read_fork", "require_id"]

_ID: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID_RULE: Final = "1 to 64 characters A-Z a-z 0-9 _ . -"
_LENGTHS: Final = ("max_tokens", "max_completion_tokens")
_PARENTS_OWN: Final = ("n", "echo", "prompt_logprobs")
"""Fields that a fork does not inherit: what is to be said of the prompt has been said, and as many samples as ids are meant."""


@dataclass(frozen=True, slots=True)
class Served:
    """What bodies are checked against."""

    models: tuple[str, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Request:
    """A body that may be served.

    Attributes:
        parsed: for the shell.
        api, body: as they came, for forks.
        size: bytes of the body as it came.
    """

    parsed: Parsed
    api: str
    body: dict[str, Any]
    size: int


def is_id(text: str) -> bool:
    """True if a stream may have this name."""
    return _ID.fullmatch(text) is not None


def require_id(text: str) -> None:
    """Raise `InvalidRequestError` for a name that no stream can have."""
    if not is_id(text):
        raise InvalidRequestError(f"id must be {_ID_RULE}", param="id")


def ids_of(message: m.Create | m.Fork) -> tuple[str, ...]:
    """The names of the new streams.

    Raises:
        InvalidRequestError: there are none, or they cannot be used.
    """
    ids = tuple(message.ids) if message.ids is not None else (message.id,) if message.id is not None else ()
    param = "id" if message.ids is None else "ids"
    if not ids or (message.ids is not None and message.id is not None):
        raise InvalidRequestError("give id, or ids for several samples", param=param)
    if len(ids) > MAX_N or len(set(ids)) != len(ids) or not all(is_id(stream_id) for stream_id in ids):
        raise InvalidRequestError(f"1 to {MAX_N} different ids of {_ID_RULE}", param=param)
    return ids


def check_numbers(message: m.Create | m.Fork) -> None:
    """Raise `InvalidRequestError` for credit or a priority out of bounds."""
    if message.max is not None:
        check_credit("max", message.max)
    if not -(2**31) <= message.priority < 2**31:
        raise InvalidRequestError("priority must be a 32-bit integer", param="priority")


def check_credit(name: str, value: int) -> None:
    """Raise `InvalidRequestError` for what is no offset."""
    if not 0 <= value <= m.MAX_CREDIT:
        raise InvalidRequestError(f"{name} must be an integer from 0 to {m.MAX_CREDIT}", param=name)


def read_create(message: m.Create, codec: m.Codec, served: Served, num_ids: int) -> Request:
    """The body of a `create`.

    Raises:
        InvalidRequestError: see `parse_body`.
    """
    return _read(message.api, message.body, codec, served, num_ids)


def read_fork(
    overrides: msgspec.Raw, parent: tuple[str, dict[str, Any]], codec: m.Codec, served: Served, num_ids: int, kept: int
) -> tuple[Request, Any]:
    """The body of a `fork`: what it gives overrides its parent's.

    Args:
        kept: tokens of the parent's own output that the fork goes on from.

    Returns:
        The body, and the text or messages that follow the parent's output, or None: then it goes on in mid-text.

    Raises:
        InvalidRequestError: see `parse_body`; or the parent generates nothing, or has nothing left to generate.
    """
    api, original = parent
    own: Any = codec.decode_any(overrides) if bytes(overrides) else {}
    if not isinstance(own, dict):
        raise InvalidRequestError("body must be an object", param="body")
    adds = ("messages" if api == "chat" else "prompt") in own
    inherited = {key: value for key, value in original.items() if key not in _PARENTS_OWN}
    if any(key in own for key in _LENGTHS):
        inherited = {key: value for key, value in inherited.items() if key not in _LENGTHS}
    if not adds:
        inherited = _left(inherited, kept)
    own = {key: value for key, value in own.items() if key not in ("n", "echo")}
    request = _read(api, msgspec.Raw(codec.encode(inherited | own)), codec, served, num_ids)
    if not isinstance(request.parsed, ParsedBody):
        raise InvalidRequestError("only streams that generate can be forked", param="from")
    return request, request.parsed.prompt if adds else None


def _left(body: dict[str, Any], kept: int) -> dict[str, Any]:
    """A body whose counts of tokens to generate are those that are left after the first `kept`."""
    for key in _LENGTHS:
        if body.get(key) is not None:
            if body[key] <= kept:
                raise InvalidRequestError("the parent has no token left to generate; give max_tokens", param="body.max_tokens")
            body = body | {key: body[key] - kept}
    if body.get("min_tokens") is not None:
        body = body | {"min_tokens": max(0, body["min_tokens"] - kept)}
    return body


def _read(api: str, body: msgspec.Raw, codec: m.Codec, served: Served, num_ids: int) -> Request:
    parsed = parse_body(api, body, codec, models=served.models, num_ids=num_ids, max_model_len=served.max_model_len)
    return Request(parsed, api, codec.decode_any(body), len(bytes(body)))

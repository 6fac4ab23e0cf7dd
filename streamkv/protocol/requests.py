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

__all__ = ["ForkRequest", "Request", "Served", "check_numbers", "ids_of", "is_id", "read_create", "read_fork", "require_id"]

_ID: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID_RULE: Final = "1 to 64 characters A-Z a-z 0-9 _ . -"


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


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """The parent's body with what the fork changes.

    Attributes:
        added: text or messages that follow the parent's output, or None.
        max_tokens_given: the fork says how many tokens to generate.
    """

    request: Request
    added: Any
    max_tokens_given: bool


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
    overrides: msgspec.Raw, parent: tuple[str, dict[str, Any]], codec: m.Codec, served: Served, num_ids: int
) -> ForkRequest:
    """The body of a `fork`: what it gives overrides its parent's.

    Raises:
        InvalidRequestError: see `parse_body`; or the parent generates nothing.
    """
    api, original = parent
    own: Any = codec.decode_any(overrides) if bytes(overrides) else {}
    if not isinstance(own, dict):
        raise InvalidRequestError("body must be an object", param="body")
    # Its parent is echoed already, and as many samples as ids are meant.
    merged = {key: value for key, value in (original | own).items() if key not in ("n", "echo")}
    request = _read(api, msgspec.Raw(codec.encode(merged)), codec, served, num_ids)
    if not isinstance(request.parsed, ParsedBody):
        raise InvalidRequestError("only streams that generate can be forked", param="from")
    added = request.parsed.prompt if ("messages" if api == "chat" else "prompt") in own else None
    return ForkRequest(request, added, any(key in own for key in ("max_tokens", "max_completion_tokens")))


def _read(api: str, body: msgspec.Raw, codec: m.Codec, served: Served, num_ids: int) -> Request:
    parsed = parse_body(api, body, codec, models=served.models, num_ids=num_ids, max_model_len=served.max_model_len)
    return Request(parsed, api, codec.decode_any(body), len(bytes(body)))

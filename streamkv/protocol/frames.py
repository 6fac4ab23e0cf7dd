"""From a frame to a message, or to the reason why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from streamkv.protocol import messages as m
from streamkv.protocol.actions import Close
from streamkv.protocol.bodies import validation_error
from streamkv.protocol.requests import is_id
from streamkv.sampling_params import MAX_N

__all__ = ["Malformed", "broken_text", "read_hello", "read_message"]

_BROKEN: Final = (msgspec.DecodeError, RecursionError, ValueError)  # of which UnicodeDecodeError is one, and integers without end


@dataclass(frozen=True, slots=True)
class Malformed:
    """A frame that is no message, as its client is told; `ids` are the new streams that it meant to make."""

    code: str
    message: str
    param: str | None
    ids: tuple[str, ...] = ()


def read_message(codec: m.Codec, data: bytes, *, is_text: bool) -> m.ClientMessage | Malformed | Close:
    """What a frame says."""
    if is_text != codec.text:
        return Close(1003, f"wrong_opcode: {codec.subprotocol} uses {'text' if codec.text else 'binary'} frames")
    if is_text and (broken := broken_text(data)) is not None:
        return broken
    try:
        message: m.ClientMessage = codec.decode_client(data)
    except _BROKEN as error:
        return _malformed(codec, data, error)
    return message


def broken_text(data: bytes) -> Close | None:
    """RFC 6455, 8.1: text is UTF-8. The whole of it is looked at: the decoder skips what it does not need."""
    if data.isascii():
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return Close(1007, "invalid_utf8: text frames are UTF-8")
    return None


def read_hello(codec: m.Codec, data: bytes, *, is_text: bool) -> m.Hello | Close:
    """What the first frame says."""
    message = read_message(codec, data, is_text=is_text)
    match message:
        case m.Hello() | Close():
            return message
        case Malformed():
            return Close(4400, f"malformed: the first frame must be hello; {message.param or 'it'}: {message.message}")
        case _:
            return Close(4400, "hello_expected: the first frame must be hello")


def _malformed(codec: m.Codec, data: bytes, error: Exception) -> Malformed:
    """Name the field at fault."""
    invalid = validation_error(error)
    try:
        loose = codec.decode_any(data)
    except _BROKEN:
        return Malformed(invalid.code, invalid.message, None)
    tag = loose.get("t") if isinstance(loose, dict) else None
    if not isinstance(tag, str) or not any(tag == kind.__struct_config__.tag for kind in m.ClientMessage.__args__):
        return Malformed("unknown_type", "t must name a message of the protocol", "t")
    ids = _named(loose) if tag in ("create", "fork") else ()
    return Malformed(invalid.code, invalid.message, invalid.param, ids)


def _named(loose: dict[Any, Any]) -> tuple[str, ...]:
    """The streams that a malformed message meant to make, as far as it tells; none if any of them is not to be named."""
    several = loose.get("ids")
    ids = several if isinstance(several, list) else [loose.get("id")]
    if (several is not None and loose.get("id") is not None) or not 1 <= len(ids) <= MAX_N:
        return ()
    if not all(isinstance(stream_id, str) and is_id(stream_id) for stream_id in ids):
        return ()
    return tuple(dict.fromkeys(ids))

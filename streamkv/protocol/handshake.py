"""The first frame of a connection: `hello`, or the reason why there is no second one."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from streamkv.protocol import messages as m
from streamkv.protocol.bodies import validation_error

__all__ = ["Close", "read_hello"]


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is pending, then close the socket with this code. The reason begins with a word for machines."""

    code: int
    reason: str


def read_hello(codec: m.Codec, data: bytes, *, is_text: bool) -> m.Hello | Close:
    """What the first frame says."""
    if is_text != codec.text:
        return wrong_opcode(codec)
    try:
        message = codec.decode_client(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        invalid = validation_error(error)
        return Close(4400, f"malformed: the first frame must be hello; {invalid.param or 'it'}: {invalid.message}")
    if not isinstance(message, m.Hello):
        return Close(4400, "hello_expected: the first frame must be hello")
    return message


def wrong_opcode(codec: m.Codec) -> Close:
    """A text frame on a binary protocol, or the other way round."""
    return Close(1003, f"wrong_opcode: {codec.subprotocol} uses {'text' if codec.text else 'binary'} frames")

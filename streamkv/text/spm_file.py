"""Reads a SentencePiece model file: the few fields of its protobuf message that a conversion needs.

By hand, because the class that comes with the sentencepiece package needs a protobuf release at least as new as the one it was
made with (0.2.3: 7.36), which would bind everything else in the environment; and so an untrusted file meets no native code.
The wire format is fixed (https://protobuf.dev/programming-guides/encoding/), the fields are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = ["Kind", "Piece", "SpmFile", "read_spm_file"]


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One word of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class SpmFile:
    """A model.

    Attributes:
        model_type: 1 Unigram, 2 BPE, 3 words, 4 characters.
        charsmap: normalisation, precompiled; empty = none.
        ids: ids of special pieces (`bos_token` ...), if there are such.
    """

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    ids: dict[str, int]


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES: Final = 10

Value = int | bytes


def read_spm_file(data: bytes) -> SpmFile:
    """Parse.

    Raises:
        ValueError, TypeError: this is no such file.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number in {2, 3}:
            (trainer if number == 2 else normalizer).update(_message(value))
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise TypeError("the normalisation is no bytes")
    places = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    ids = {name: _integer(trainer, number, default) for name, (number, default) in places.items()}
    return SpmFile(
        pieces=pieces,
        model_type=_integer(trainer, 3, 1),
        byte_fallback=bool(_integer(trainer, 35, 0)),
        whitespace_as_suffix=bool(_integer(trainer, 24, 0)),
        charsmap=charsmap,
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        escape_whitespaces=bool(_integer(normalizer, 5, 1)),
        ids={name: index for name, index in ids.items() if 0 <= index < len(pieces)},
    )


def _piece(fields: dict[int, Value]) -> Piece:
    text, score = fields.get(1), fields.get(2, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != _FIXED[_FIXED32]:
        raise ValueError("a piece has no text or no score")
    return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(_integer(fields, 3, Kind.NORMAL)))


def _integer(fields: dict[int, Value], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise TypeError(f"field {number} is no integer")
    return value - 2**64 if value >= 2**63 else value


def _message(value: Value) -> dict[int, Value]:
    if not isinstance(value, bytes):
        raise TypeError("a message is no bytes")
    return dict(_fields(value))


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field: integers, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"there is no wire type {wire}")
        if at + size > len(data):
            raise ValueError("the file is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & (2**64 - 1), at + place + 1
    raise ValueError("an integer has no end")

"""JSON from files that nobody vouches for: bounded in size, depth, nodes and numbers, and without repeated keys."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from streamkv.errors import ModelLoadError

__all__ = ["parse_object", "read_file", "walk"]

_MAX_DIGITS: Final = 40
"""`model_max_length` is 10**30 in many tokenizer_config.json."""
_MAX_DEPTH: Final = 32


def read_file(file: Path, max_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        ModelLoadError: it is larger, or cannot be read.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ModelLoadError(f"{file} is larger than {max_bytes} bytes, the most that is read of such a file")
    return data


def parse_object(data: bytes, what: object, *, max_nodes: int) -> dict[str, Any]:
    """A JSON object.

    Args:
        what: the file's name, for the error.
        max_nodes: most values in it. They are bounded by its commas and brackets before it is parsed, because a list costs
            twenty times its two characters.

    Raises:
        ModelLoadError: no JSON object, too many values, a number without a meaning (NaN), or a key that stands there twice.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > max_nodes:
        raise ModelLoadError(f"{what} holds more than {max_nodes} values, the most that is read of such a file")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:  # a ValueError of `json` itself, of UTF-8, or of the hooks below
        reason = f": {error}" if isinstance(error, _RefusedError) else ""
        raise ModelLoadError(f"{what} cannot be read as JSON{reason}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what} must hold a JSON object")
    return value


def walk(value: object, what: object) -> Iterator[tuple[str, object]]:
    """Every (key, value) of the objects in a value, however deep.

    Raises:
        ModelLoadError: deeper than any configuration is.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for container in level:
            if isinstance(container, dict):
                yield from container.items()
                inner += container.values()
            elif isinstance(container, list):
                inner += container
        level = [part for part in inner if isinstance(part, (dict, list))]
        if not level:
            return
    raise ModelLoadError(f"{what} is nested more than {_MAX_DEPTH} levels deep")


class _RefusedError(ValueError):
    """Well-formed JSON that is refused; the message says why."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):  # which of them counts depends on the reader, so that one reader's check is not another's
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"the key {twice[:100]!r} stands there twice")
    return result


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _RefusedError(f"an integer has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _RefusedError(f"{text[:100]} is no finite number")
    return value


def _no_number(text: str) -> float:
    raise _RefusedError(f"{text} is no finite number")

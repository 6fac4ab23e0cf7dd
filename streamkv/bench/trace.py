"""A trace: requests with their times, lengths and shared blocks, in the format of Mooncake's public traces.

One JSON object a line: `timestamp` (milliseconds), `input_length`, `output_length` (tokens), `hash_ids`: one number for every
512 tokens of the prompt; where two prompts have the same numbers from the start on, they have the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final

import msgspec

from streamkv.bench.lengths import scaled
from streamkv.errors import ConfigError

__all__ = ["BLOCK", "TOKEN_IDS", "TraceRequest", "ideal_hit_ratio", "prompt_of", "read_trace", "shrink", "write_trace"]

BLOCK: Final = 512
"""Tokens of one hash id."""

TOKEN_IDS: Final = range(32, 256)
"""In every model's vocabulary, and clear of the special tokens that stand first."""

_TO_IDS: Final = bytes(TOKEN_IDS.start + value % len(TOKEN_IDS) for value in range(256))


class TraceRequest(msgspec.Struct, frozen=True):
    """One request; `timestamp` in milliseconds from the start of the trace."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests of a file, in the order of their times.

    Raises:
        ConfigError: the file cannot be read, or a line is no request.
    """
    requests = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line.strip():
                requests.append(_checked(msgspec.json.decode(line, type=TraceRequest), path, number))
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no trace: {error}") from error
    if not requests:
        raise ConfigError(f"{path} has no request")
    return sorted(requests, key=lambda request: request.timestamp)


def _checked(request: TraceRequest, path: Path, number: int) -> TraceRequest:
    if request.input_length < 1 or request.output_length < 1 or len(request.hash_ids) != -(-request.input_length // BLOCK):
        raise ConfigError(f"{path}, line {number}: lengths must be at least 1, with one hash id for every {BLOCK} prompt tokens")
    return request


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Write what `read_trace` reads."""
    path.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))


def shrink(request: TraceRequest, scale: int) -> tuple[int, int]:
    """(prompt, output) tokens with lengths divided by `scale`; the prompt keeps its number of blocks."""
    fewest = (len(request.hash_ids) - 1) * (BLOCK // scale) + 1
    return max(fewest, scaled(request.input_length, scale)), scaled(request.output_length, scale)


def prompt_of(request: TraceRequest, scale: int, seed: int) -> list[int]:
    """Token ids; the same hash id is the same `BLOCK // scale` tokens in every request of this seed."""
    size = BLOCK // scale
    whole = b"".join(_block(hash_id, size, seed) for hash_id in request.hash_ids)
    return list(whole[: shrink(request, scale)[0]])


@lru_cache(maxsize=8192)
def _block(hash_id: int, size: int, seed: int) -> bytes:
    return Random(f"{seed} {hash_id}").randbytes(size).translate(_TO_IDS)  # noqa: S311  # load, not secrets


def ideal_hit_ratio(requests: Sequence[TraceRequest]) -> float:
    """Share of all blocks (0..1) that a cache which never forgets would have had."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        known = 0
        while known < len(request.hash_ids) and request.hash_ids[known] in seen:
            known += 1
        seen.update(request.hash_ids)
        hits += known
        total += len(request.hash_ids)
    return hits / total

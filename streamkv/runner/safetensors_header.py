"""What a safetensors file says about itself, believed only after every offset has been checked.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamkv.errors import ModelLoadError
from streamkv.runner.bounded_json import parse_object

__all__ = ["ITEM_SIZES", "TensorEntry", "read_header"]

_FLOATS: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHERS: Final = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

ITEM_SIZES: Final = _FLOATS | _OTHERS
"""Bytes of an element. Eight bits and less of floating point only come with quantised weights, which are not served."""

_MAX_HEADER: Final = 100_000_000  # bytes; the format's own bound
_MAX_NODES: Final = 2_000_000
_MAX_RANK: Final = 8
_MAX_NAME: Final = 500


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: as in the header, a key of `ITEM_SIZES`.
        begin, end: bytes from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.end - self.begin


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ModelLoadError: the header is damaged or lies about the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ModelLoadError(f"{file} is cut or is no safetensors file: it has {size} bytes and a header of {length}")
            data = stream.read(length)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    table = parse_object(data, f"the header of {file}", max_nodes=_MAX_NODES)
    table.pop("__metadata__", None)  # strings for people
    entries = [_entry(name, value, file, 8 + length) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(file, entries, 8 + length, size)
    return entries


def _entry(name: str, value: Any, file: Path, start: int) -> TensorEntry:
    where = f"tensor {name[:100]!r} of {file}"
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ModelLoadError(f"{where} has a name that no parameter can have")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ModelLoadError(f"{where} is stored as {str(dtype)[:20]!r}; served are models stored as F32, F16 or BF16")
    if not _are_sizes(shape, _MAX_RANK) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise ModelLoadError(f"{where} has a shape or offsets that are no sizes")
    if math.prod(shape) * ITEM_SIZES[dtype] != offsets[1] - offsets[0]:
        raise ModelLoadError(f"{where} has other offsets than its shape needs")
    return TensorEntry(name, file, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values)
    )


def _check_cover(file: Path, entries: list[TensorEntry], begin: int, end: int) -> None:
    """Tensors follow each other and fill the file: nothing overlaps, and nothing can be hidden between them."""
    for entry in entries:
        if entry.begin != begin:
            raise ModelLoadError(f"tensor {entry.name!r} of {file} overlaps another or leaves a gap")
        begin = entry.end
    if begin != end:
        raise ModelLoadError(f"{file} is cut or has bytes that belong to no tensor")

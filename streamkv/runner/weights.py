"""Tensors of a checked folder, mapped into memory one by one.

Each tensor has a mapping of its own, which ends with the tensor: what is converted to another dtype, merged with others or
packed for oneDNN leaves no page behind, and what is used as it lies in the file is never copied. One mapping for a file,
as safetensors makes it, stays whole until the last tensor in it has gone, and its touched pages are in the process's
resident size beside the copies.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable
from typing import Final
from weakref import WeakSet

import structlog
import torch
from tqdm import tqdm

from streamkv.errors import ModelLoadError
from streamkv.runner.safetensors_header import TensorEntry

__all__ = ["LazyTensor", "MappedWeights"]

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MIN_MAPPED: Final = 64 * 1024  # bytes; a mapping is a kernel object and ends at a page's border
_READ: Final = 1024 * 1024
_REPORT_EVERY_S: Final = 5.0

log = structlog.get_logger(__name__)


class MappedWeights:
    """The weights of a model, none of which is in memory until it is used."""

    def __init__(self, tensors: Iterable[TensorEntry]) -> None:
        self._tensors = list(tensors)
        self._maps: WeakSet[mmap.mmap] = WeakSet()
        self.num_bytes = sum(tensor.num_bytes for tensor in self._tensors)
        self.refused: ModelLoadError | None = None
        """What transformers swallowed: it collects errors of single tensors and raises one of its own."""

    @property
    def mapped_bytes(self) -> int:
        """What is mapped now: resident while it is used, and yet page cache in the system's books."""
        return sum(len(mapping) for mapping in self._maps)

    def state_dict(self) -> dict[str, LazyTensor]:
        """Name -> tensor to be had by `[...]`, as transformers' loader reads its own."""
        return {tensor.name: LazyTensor(self, tensor) for tensor in self._tensors}

    def materialize(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor, mapped if it is large; in the file's dtype.

        Raises:
            ModelLoadError: it holds integers, which only quantised weights do, or the file cannot be read.
        """
        dtype = _DTYPES[entry.dtype]
        if not dtype.is_floating_point:
            self.refused = ModelLoadError(f"{entry.name} in {entry.file} holds {entry.dtype}; quantised weights are not served")
            raise self.refused
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        try:
            buffer, offset = self._buffer(entry, dtype.itemsize)
        except (OSError, ValueError) as error:  # mmap raises ValueError where the file has become shorter
            self.refused = ModelLoadError(f"{entry.file} cannot be mapped into memory: {error}")
            raise self.refused from error
        return torch.frombuffer(buffer, dtype=dtype, count=entry.num_bytes // dtype.itemsize, offset=offset).view(entry.shape)

    def _buffer(self, entry: TensorEntry, item_size: int) -> tuple[mmap.mmap | bytearray, int]:
        """(what holds the bytes, where in it they start)."""
        with entry.file.open("rb") as stream:
            if entry.num_bytes < _MIN_MAPPED or entry.begin % item_size:
                stream.seek(entry.begin)
                return bytearray(stream.read(entry.num_bytes)), 0
            start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
            # Private: a write would go to a copy of the page, never to the file.
            mapping = mmap.mmap(stream.fileno(), entry.end - start, offset=start, access=mmap.ACCESS_COPY)
        self._maps.add(mapping)
        return mapping, entry.begin - start

    def untouch(self) -> None:
        """Give back the pages that have been read; who needs them again gets them from the page cache.

        A page that had been written to would be as in the file again; nothing here writes to weights.
        """
        for mapping in list(self._maps):
            if hasattr(mmap, "MADV_DONTNEED"):  # Linux
                mapping.madvise(mmap.MADV_DONTNEED)

    def read_through(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Bring the files into the page cache, in order and with progress.

        A forward pass would do it too, page by page and in silence. What is cached already takes a tenth of a second per GB.
        """
        began = last = clock()
        done = 0
        buffer = bytearray(_READ)
        with tqdm(
            total=self.num_bytes, desc="reading weights", unit="B", unit_scale=True, delay=1, leave=False, disable=None
        ) as bar:
            for file in dict.fromkeys(tensor.file for tensor in self._tensors):
                with file.open("rb", buffering=0) as stream:
                    while count := stream.readinto(buffer):
                        done += count
                        bar.update(count)
                        if bar.disable and clock() - last >= _REPORT_EVERY_S:
                            last = clock()
                            log.info("reading_weights", bytes=done, of=self.num_bytes, seconds=round(last - began, 1))
        log.info("weights_read", bytes=done, seconds=round(clock() - began, 2))


class LazyTensor:
    """Stands for a tensor in a state dict."""

    def __init__(self, weights: MappedWeights, entry: TensorEntry) -> None:
        self._weights, self._entry = weights, entry

    def __getitem__(self, index: object) -> torch.Tensor:
        """All of it; transformers asks for parts only to spread a model over several devices."""
        assert index is Ellipsis, "only whole tensors are loaded"
        return self._weights.materialize(self._entry)

"""What went wrong in a step: memory was short, the device is lost, or something else.

Torch, CuPy, the driver and the host each say in their own way that memory is short, so that is told by names and words; none of
them is imported here. That a device is lost is never told by words: it is asked (`ModelRunner.resume`).
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Final

from streamkv.errors import StreamKVError

__all__ = ["DeviceLostError", "is_out_of_memory", "let_go"]

_SHORT: Final = re.compile(
    r"out[ _]of[ _]memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED|can(?:'t|not) allocate memory",
    re.IGNORECASE,
)


class DeviceLostError(StreamKVError):
    """The device answers no more in this process; a new process is needed."""

    code = "engine_lost"
    retryable = True


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on the device or on the host, whoever says so."""
    return any(
        isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" or _SHORT.search(str(one)) is not None
        for one in _chain(error)
    )


def let_go(error: BaseException) -> None:
    """Forget what the functions it came through were working on: an exception keeps their tensors as long as it lives."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__

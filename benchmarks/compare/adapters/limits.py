"""What the machine can do, by torch: bytes read a second, and operations a second of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from benchmarks.compare.adapters import Opened

_READS, _PRODUCTS = 8, 16
_SHAPES = ((256, 1024, 5632), (512, 1024, 5632), (512, 4096, 4096))  # rows, inner, columns


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `dtype` of the products, `threads`, `read_bytes` (more than any cache holds).

    The answer to anything is {"bandwidth": bytes/s, "peak": operations/s}, the best of several tries each.
    """
    torch.set_num_threads(options["threads"])
    size = options["read_bytes"] // 4
    rows = torch.ones(size // 4096, 4096)  # [rows, 4096]
    vector = torch.ones(4096)
    dtype = getattr(torch, options["dtype"])
    factors = [(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)) for m, k, n in _SHAPES]

    def answer(_: Any) -> dict[str, float]:
        nbytes = rows.numel() * 4
        seconds = min(_best(rows.sum, _READS), _best(lambda: torch.mv(rows, vector), _READS))
        rates = []
        for a, b in factors:
            operations = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            rates.append(operations / _best(lambda a=a, b=b: a @ b, _PRODUCTS))  # type: ignore[misc]  # called at once
        return {"bandwidth": nbytes / seconds, "peak": max(rates)}

    with torch.inference_mode():
        yield Opened(answer)


def _best(call: Callable[[], object], count: int) -> float:
    fastest = float("inf")
    for _ in range(count):
        began = perf_counter()
        call()
        fastest = min(fastest, perf_counter() - began)
    return fastest

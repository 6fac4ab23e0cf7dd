"""Where the stages run: a GPU, or the emulator, where everything runs and nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch

from streamkv_kernels.cuda_device import CudaDevice
from streamkv_kernels.device import Device
from streamkv_kernels.emulated import EmulatedDevice

__all__ = ["Call", "Machine"]

Call = Callable[[], Any]

_ROUNDS: Final = 15
_SECONDS: Final = 0.25
"""Of replays that a figure may take."""


@dataclass
class Machine:
    """Kernels, a place for tensors, and a clock.

    Attributes:
        kernels: runs kernels.
        place: where tensors are.
        tiny: shapes that the emulator can run.
        ceilings: what was measured of the device itself: `read` and `copy` in bytes/s, `matmul` in operations/s.
    """

    kernels: Device
    place: torch.device
    tiny: bool
    ceilings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def named(cls, device: str, *, tiny: bool) -> Machine:
        """`cuda` or `emulated`.

        Raises:
            BackendError: there is no GPU that works.
        """
        if device == "emulated":
            return cls(EmulatedDevice(optimize=1), torch.device("cpu"), tiny)
        return cls(CudaDevice(device), torch.device(device), tiny)

    @property
    def timed(self) -> bool:
        """Whether figures mean anything here."""
        return self.place.type == "cuda"

    def fits(self, num_bytes: float) -> bool:
        """Whether so much memory is free, and some is left."""
        if not self.timed:
            return num_bytes <= 64e6
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
        return num_bytes <= 0.85 * torch.cuda.mem_get_info()[0]

    def seconds(self, calls: Sequence[Call], *, graph: bool = True) -> float | None:
        """Median seconds of a call; None where nothing is timed.

        Args:
            calls: of equal work, on inputs that together exceed the cache; all are made once before anything is timed.
            graph: record all and time replays, so that only the device counts; else what the host takes counts too.
        """
        for call in calls:
            call()
        if not self.timed:
            return None
        once = _graph_of(calls) if graph else _in_turn(calls)
        first = _elapsed(once)
        rounds = max(3, min(_ROUNDS, int(_SECONDS / max(first, 1e-6))))
        return median(_elapsed(once) for _ in range(rounds)) / len(calls)

    def host_seconds(self, call: Call, times: int = 200) -> float | None:
        """Median seconds that the host spends in a call, the device being idle before it."""
        call()
        if not self.timed:
            return None
        spent = []
        for _ in range(times):
            torch.cuda.synchronize()
            begun = perf_counter()
            call()
            spent.append(perf_counter() - begun)
        return median(spent)

    def recorded(self, call: Call) -> Call:
        """A CUDA graph of a call, which has been made once before; without a GPU the call itself."""
        call()
        return _graph_of([call]) if self.timed else call

    def share(self, rate: float | None, ceiling: str) -> float | None:
        """A rate as a share of a ceiling, if both are known."""
        return None if rate is None or ceiling not in self.ceilings else rate / self.ceilings[ceiling]

    def synchronize(self) -> None:
        """Wait for the device.

        Raises:
            RuntimeError: something went wrong on it, now or before.
        """
        if self.timed:
            torch.cuda.synchronize()


def _in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _graph_of(calls: Sequence[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _elapsed(call: Call) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3

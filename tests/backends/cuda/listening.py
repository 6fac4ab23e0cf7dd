"""A device that remembers what was launched on it, with which arguments, and can launch it again, as a CUDA graph does."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamkv_kernels.device import Argument, Bound, Grid, Kernel, Variant
from streamkv_kernels.emulated import EmulatedDevice


@dataclass(frozen=True)
class Launch:
    name: str
    bound: Bound
    grid: Grid
    block: Grid
    counters: dict[str, int]


@dataclass
class Listening:
    device: EmulatedDevice
    launches: list[Launch] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def num_sms(self) -> int:
        return self.device.num_sms

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> Kernel:
        return _Kernel(self, name, self.device.kernel(variant, name, shared_bytes))

    def take(self) -> list[Launch]:
        """Those since the last time."""
        taken, self.launches = self.launches, []
        return taken


@dataclass(frozen=True)
class _Kernel:
    listening: Listening
    name: str
    kernel: Kernel

    def bind(self, *arguments: Argument) -> Bound:
        return _Bound(self.listening, self.name, self.kernel.bind(*arguments))

    def launch(self, grid: Grid, block: Grid, *arguments: Argument) -> None:
        self.bind(*arguments).launch(grid, block)


@dataclass(frozen=True)
class _Bound:
    listening: Listening
    name: str
    bound: Bound

    def launch(self, grid: Grid, block: Grid) -> None:
        self.bound.launch(grid, block)
        launch = Launch(self.name, self.bound, grid, block, dict(self.listening.device.counters))
        self.listening.launches.append(launch)

"""Forward passes as CUDA graphs: recorded once for a number of tokens, then launched as a whole, without their Python.

A graph holds addresses. Token ids and positions are copied to where its inputs lie; what attention reads of a step lies at
addresses that stay (`CudaBackend.generation`). All graphs share one pool of memory: a result is good until the next replay.

Where the kernels are emulated there is no such thing, so a pass is written down as it goes by, torch's operations and launches
of kernels, and done again in the same order with the same tensors. So everything but the capture itself is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamkv_backends.taped import FRESH, OtherPathError, TorchCall, Watch, is_view, tensors_in
from streamkv_kernels.cuda_device import CudaDevice
from streamkv_kernels.device import Device

__all__ = ["SIZES", "CudaGraphs", "RecordedPass", "recorded_size"]

SIZES: Final = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 513, 32))
"""Numbers of tokens that passes are recorded for; a step is padded to the next one. A decode is bound by reading weights and
cache, so that rows of padding cost next to nothing, and each graph costs memory and the time to capture it."""


def recorded_size(num_tokens: int) -> int | None:
    """The least of `SIZES` that has room; None = a step so large is not recorded."""
    return next((size for size in SIZES if size >= num_tokens), None)


class Graph(Protocol):
    """Something that can be done again."""

    def replay(self) -> None:
        """Once more, on torch's current stream."""


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """A pass that can be run again with other inputs of the same shapes."""

    graph: Graph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Its result, overwritten by the next replay of any graph; None if this step has to go through Python."""
        for to, value in zip(self.inputs, inputs, strict=True):
            to.copy_(value, non_blocking=True)
        try:
            self.graph.replay()
        except OtherPathError:
            return None
        return self.output


class CudaGraphs:
    """Records passes on one device."""

    def __init__(self, device: Device) -> None:
        """Nothing is recorded yet."""
        self._device = device
        self._memory: Any = None  # of all graphs

    def record(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, RecordedPass]:
        """Run `function(*inputs)`, and record it.

        Raises:
            Exception: it cannot be recorded, because it waits for the device or does what a graph cannot hold.
        """
        output = function(*inputs)  # first, so that kernels are loaded and libraries set up, which no graph can hold
        own = tuple(value.clone() for value in inputs)
        graph, result = self._capture(lambda: function(*own))
        return output, RecordedPass(graph, own, result)

    def _capture(self, function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        if not isinstance(self._device, CudaDevice):
            emulated = EmulatedGraph()
            return emulated, emulated.capture(self._device, function)
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        # Other threads may go on using CUDA while this one captures.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = function()
        return graph, result


class EmulatedGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """A pass as a list of calls. What it makes on the way it keeps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._calls: list[Callable[[], None]] = []
        self._kept: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, seconds long, to keep it away from here."""
        return False

    def capture(self, device: Any, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `function`, and write down what it does.

        Raises:
            NotRecordableError: it reads a tensor into Python, which on a GPU would wait for the device.
        """
        device.on_launch = self._calls.append
        try:
            with Watch(), self:
                return function()
        finally:
            device.on_launch = None

    def replay(self) -> None:
        """`Graph.replay`.

        Raises:
            OtherPathError: Python was told another value when the pass was recorded.
        """
        for call in self._calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation below Python."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in FRESH:
            self._kept.append(result)
        elif not is_view(func, tensors_in((args, tuple(kwargs.values()))), tensors_in(result)):
            self._calls.append(TorchCall(func, args, kwargs, result).again)
        return result

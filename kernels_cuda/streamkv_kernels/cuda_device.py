"""Runs the kernels on a GPU: cubins of `compile.py`, loaded and launched by CuPy, on torch's tensors and torch's stream.

CuPy is imported when a device is made, and allocates nothing: the kernels get addresses of torch's memory. Modules stay loaded
as long as the device, so that a CUDA graph that has recorded a launch stays valid.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from streamkv.errors import BackendError
from streamkv_kernels.compile import architecture_for, find_or_build
from streamkv_kernels.device import Argument, Grid, Variant

__all__ = ["CudaBound", "CudaDevice", "CudaKernel"]

_ALWAYS_SHARED: Final = 48 * 1024
"""Bytes of shared memory that a block may have without being asked for at load time."""

_MOST_SHARED: Final = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KiB of it that a block may have at all (CUDA C++ Programming Guide, table of technical specifications)."""


class _Stream:
    """As much of a stream as a launch looks at."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CudaDevice:
    """One GPU."""

    def __init__(self, device: str = "cuda") -> None:
        """Take a GPU.

        Args:
            device: torch device; without an index the current one.

        Raises:
            BackendError: there is none that works, or CuPy is missing; one sentence says what to do.
        """
        if torch.version.cuda is None:
            raise BackendError("this build of torch has no CUDA; install one that has, or use --backend cpu")
        if not torch.cuda.is_available():
            raise BackendError(
                "torch sees no GPU; see that nvidia-smi lists one and that its driver is new enough for this torch"
            )
        self._cupy = _cupy()
        asked = torch.device(device)
        self.index: int = torch.cuda.current_device() if asked.index is None else asked.index
        if self.index >= torch.cuda.device_count():
            raise BackendError(f"there is no GPU {self.index}; torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(self.index)  # CuPy loads and launches on the thread's current GPU; a backend has one thread
        properties = torch.cuda.get_device_properties(self.index)
        self._architecture = architecture_for((properties.major, properties.minor))
        self._name, self._num_sms = properties.name, properties.multi_processor_count
        self._modules: dict[Variant, Any] = {}

    @property
    def name(self) -> str:
        """For people."""
        return f"{self._name} ({self._architecture})"

    @property
    def num_sms(self) -> int:
        """Multiprocessors."""
        return self._num_sms

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> CudaKernel:
        """A function of a variant; `Device.kernel`.

        Raises:
            BackendError: it cannot be compiled or loaded, or needs more shared memory than this GPU has.
        """
        if shared_bytes > _MOST_SHARED[self._architecture] * 1024:
            raise BackendError(f"{variant.source} needs {shared_bytes} bytes of shared memory, more than {self.name} has")
        if variant not in self._modules:
            self._modules[variant] = self._cupy.RawModule(path=str(find_or_build(variant, self._architecture)))
        function = self._modules[variant].get_function(name)
        if shared_bytes > _ALWAYS_SHARED:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return CudaKernel(function, shared_bytes, self.index)


class CudaKernel:
    """A loaded function."""

    def __init__(self, function: Any, shared_bytes: int, device: int) -> None:
        self.function, self.shared_bytes, self.device = function, shared_bytes, device

    def bind(self, *arguments: Argument) -> CudaBound:
        """Pack the arguments for many launches."""
        return CudaBound(self, arguments)

    def launch(self, grid: Grid, block: Grid, *arguments: Argument) -> None:
        """Bind, and launch once."""
        CudaBound(self, arguments).launch(grid, block)


class CudaBound:
    """Packed arguments. CuPy takes an int for a 64-bit word, an address too, and a float for a double."""

    def __init__(self, kernel: CudaKernel, arguments: tuple[Argument, ...]) -> None:
        self._kernel = kernel
        self._tensors = arguments  # kept alive
        self._packed = tuple(_packed(argument) for argument in arguments)

    def launch(self, grid: Grid, block: Grid) -> None:
        """Run it on torch's current stream, which is read now: a graph may be recording on another than last time."""
        kernel = self._kernel
        stream = _Stream(torch.cuda.current_stream(kernel.device).cuda_stream)
        kernel.function(grid, block, self._packed, shared_mem=kernel.shared_bytes, stream=stream)


def _packed(argument: Argument) -> int | float:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise BackendError(f"the cuda backend needs CuPy ({error}); pip install 'streamkv[gpu]'") from error
    return cupy

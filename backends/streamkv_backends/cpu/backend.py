"""Paged attention by kernels of our own on processors: every key and value is read once a group of heads, nothing is gathered.

    pool    per layer [num_blocks, num_kv_heads, 2, block_size * head_dim], inside as `kernels/attention.cpp` likes it

A sequence's result depends on nothing but its own tokens: not on the batch, nor on how its prompt was cut into chunks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_void_p, pointer
from typing import Any, Final

import torch

from streamkv.attention import KVSpec, LayerSpec, Limits, StepTensors
from streamkv.errors import BackendError
from streamkv_backends.cpu.native import Attend, Call, Shape, Step, library
from streamkv_backends.cpu.ops import CpuOps
from streamkv_backends.cpu.tape import Recorded
from streamkv_backends.tensor_pool import TensorPool

__all__ = ["CpuBackend", "CpuKVPool", "CpuMetadata"]

_HEAD_DIMS: Final = frozenset({*range(16, 257, 16), 512})
_BLOCK_SIZES: Final = frozenset({16, 32, 64, 128})
_AS_IT_IS: Final = 64
_MOST_RECORDED: Final = 256
"""Tokens of a step. Every number of them up to the first has a recording of its own; up to the second decode steps are padded to
a multiple of `_PAD`, which costs a product next to nothing and keeps large recordings few."""
_PAD: Final = 32  # rows of two matrix tiles
_INT32_MAX: Final = 2**31 - 1
ITEM_KINDS: Final = ("whole", "prefix", "suffix", "part", "merge")


class CpuKVPool(TensorPool):
    """All blocks, one tensor a layer."""

    def __init__(self, spec: KVSpec) -> None:
        """[num_blocks, num_kv_heads, 2, block_size * head_dim] a layer."""
        shapes = [(spec.num_blocks, layer.num_kv_heads, 2, spec.block_size * layer.head_dim) for layer in spec.layers]
        super().__init__(spec, torch.device("cpu"), shapes, block_dim=0)


class _Plan:
    """Owns a plan of the library, and what it points to."""

    def __init__(self, native: Any, step: Step, shape: Shape, keep: StepTensors) -> None:
        self._native, self._keep = native, (step, keep)
        self.address = native.skv_plan(byref(step), byref(shape))
        if not self.address:
            raise MemoryError("no memory to plan an attention step")

    def kinds(self) -> dict[str, int]:
        """How many items of each kind there are."""
        counts = (ctypes.c_int32 * len(ITEM_KINDS))()
        self._native.skv_plan_kinds(self.address, counts)
        return dict(zip(ITEM_KINDS, counts, strict=True))

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.skv_plan_free(self.address)


class CpuMetadata:
    """One step; plans are made when the first layer of a shape asks."""

    def __init__(self, native: Any, tensors: StepTensors, block_size: int) -> None:
        self.num_tokens = len(tensors.slots)
        self.decodes = len(tensors.seq_lens) == self.num_tokens
        tables = tensors.block_tables
        self._keep = StepTensors(
            tensors.query_start.contiguous(), tensors.seq_lens.contiguous(), tables.contiguous(), tensors.slots.contiguous()
        )
        self._native = native
        self._step = Step(
            len(tensors.seq_lens),
            self.num_tokens,
            tables.shape[1],
            block_size,
            self._keep.query_start.data_ptr(),
            self._keep.seq_lens.data_ptr(),
            self._keep.block_tables.data_ptr(),
            self._keep.slots.data_ptr(),
        )
        self._plans: dict[LayerSpec, _Plan] = {}

    def plan(self, spec: LayerSpec) -> _Plan:
        """The step's plan for layers like `spec`."""
        plan = self._plans.get(spec)
        if plan is None:
            window = min(spec.window or 0, _INT32_MAX)
            shape = Shape(spec.num_heads, spec.num_kv_heads, spec.head_dim, window, spec.scale, spec.soft_cap or 0.0)
            plan = self._plans[spec] = _Plan(self._native, self._step, shape, self._keep)
        return plan


class CpuBackend:
    """See the module's docstring."""

    name = "cpu"

    def __init__(self, device: torch.device | str = "cpu", *, native: Any = None) -> None:
        """Load the kernels, compiled the first time.

        Args:
            native: another build of the library (tests).

        Raises:
            BackendError: another device is asked for, or the kernels cannot be had here.
        """
        if str(device).partition(":")[0] not in {"auto", "cpu"}:
            raise BackendError(f"the cpu backend runs on the processor, not on {device}; leave --device at auto")
        self._native = library() if native is None else native
        self.ops = CpuOps(self._native)
        self._pool: CpuKVPool | None = None
        self._shapes: list[LayerSpec] = []  # the different ones among its layers

    @property
    def limits(self) -> Limits:
        """What the kernels are written for."""
        return Limits("cpu", frozenset({torch.float32, torch.bfloat16}), _HEAD_DIMS, _BLOCK_SIZES)

    def allocate_kv(self, spec: KVSpec) -> CpuKVPool:
        """Allocate the pool, zeroed."""
        refusal = self.limits.refusal(spec)
        if refusal is not None:
            raise BackendError(refusal)
        self._pool = CpuKVPool(spec)
        self.ops.pool += 1
        self._shapes = list(dict.fromkeys(spec.layers))
        return self._pool

    def prepare(self, tensors: StepTensors) -> CpuMetadata:
        """Hand over the step's arrays as they are."""
        assert self._pool is not None, "allocate_kv comes first"
        return CpuMetadata(self._native, tensors, self._pool.spec.block_size)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: CpuMetadata,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v, attend; all in one call."""
        assert self._pool is not None, "allocate_kv comes first"
        spec, pool = self._pool.spec.layers[layer], self._pool.layers[layer]
        # What the kernels cannot see: they take the addresses' word for it.
        assert query.shape == (metadata.num_tokens, spec.num_heads, spec.head_dim)
        assert key.shape == value.shape == (metadata.num_tokens, spec.num_kv_heads, spec.head_dim)
        assert sinks is None or len(sinks) == spec.num_heads
        dtype = query.dtype
        query, key, value = _rows(query, pool.dtype), _rows(key, pool.dtype), _rows(value, pool.dtype)
        logits = None if sinks is None else sinks.float().contiguous()
        output = self.ops.empty((metadata.num_tokens, spec.num_heads, spec.head_dim), pool.dtype)
        call = Call(
            pool.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            None if logits is None else logits.data_ptr(),
            output.data_ptr(),
            pool.dtype is torch.float32,
        )
        self._native.skv_attend(metadata.plan(spec).address, byref(call))
        self.ops.note("attend", Attend(pointer(call), self._shapes.index(spec)))
        return output.to(dtype)

    @property
    def recorded_ahead(self) -> tuple[int, ...]:
        """None: a size costs no more to record when it comes."""
        return ()

    def recorded_size(self, num_tokens: int) -> int | None:
        """Small steps as they are, larger ones padded; beyond, Python is a small part of a step."""
        if num_tokens > _MOST_RECORDED or self._pool is None or self._pool.spec.dtype is not self.ops.dtype:
            return None
        return num_tokens if num_tokens <= _AS_IT_IS else -(-num_tokens // _PAD) * _PAD

    def recording_key(self, metadata: CpuMetadata) -> int | None:
        """Addresses in a recording are those of the pool of its time. Of large steps only decodes come again and again."""
        return self.ops.pool if metadata.num_tokens <= _AS_IT_IS or metadata.decodes else None

    def record(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, Recorded | None]:
        """Run `function(*inputs)`; its result, and the recording for `replay`, None if it cannot be run again."""
        return self.ops.record(function, inputs)

    def replay(self, recorded: Recorded, inputs: tuple[torch.Tensor, ...], metadata: CpuMetadata) -> torch.Tensor | None:
        """Run a recorded pass again, over another step's sequences; as many tokens as when it was recorded.

        Returns:
            Its result, overwritten by the next replay; None if this step has to go through Python.
        """
        if recorded.pool != self.ops.pool:
            return None
        plans = (c_void_p * len(self._shapes))(*(metadata.plan(spec).address for spec in self._shapes))
        return recorded.replay(inputs, plans)


def _rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the pool's dtype, each head's numbers side by side; nearly always as it is."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""Paged attention by CUDA kernels (kernels_cuda/), on a GPU or, for tests and for looking closely, emulated on a processor.

A step's sequences are divided: few new tokens are decoded, many are prefilled; each kernel has its plan of equal work, made once
a step for each kind of layer. Then a layer is three launches or four: new keys and values to their slots, decode, prefill, and
what joins pieces of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from streamkv.attention import KVSpec, LayerSpec, Limits, StepTensors
from streamkv.errors import BackendError
from streamkv_backends.cuda.ops import CudaOps
from streamkv_backends.cuda.pool import CudaKVPool
from streamkv_kernels.attention import AttentionSpec
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention
from streamkv_kernels.checks import aligned
from streamkv_kernels.cuda_device import CudaDevice
from streamkv_kernels.decode_plan import ROWS, DecodePlan
from streamkv_kernels.device import Device
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.kv_write import KVWriter
from streamkv_kernels.prefill_plan import PrefillPlan

__all__ = ["CudaBackend", "CudaMetadata"]

_HEAD_DIMS: Final = frozenset({64, 80, 96, 128, 256})
_BLOCK_SIZES: Final = frozenset({16, 32, 64})
_FEW_SEQS: Final = 64
"""For how many sequences decode plans have room at first; it doubles when more come."""


class _Kind:
    """The kernels for layers that are attended to alike."""

    def __init__(self, device: Device, spec: AttentionSpec, place: torch.device, max_seqs: int) -> None:
        self.spec, self._device, self._place = spec, device, place
        self.decode = DecodeAttention(device, spec, max_seqs, place)
        self.prefill = PrefillAttention(device, spec, place=place)

    def make_room(self, num_seqs: int) -> None:
        if num_seqs > self.decode.max_seqs:
            self.decode = DecodeAttention(self._device, self.spec, 2 * num_seqs, self._place)


@dataclass(frozen=True, slots=True)
class CudaMetadata:
    """One step on the device.

    Attributes:
        query_start, seq_lens, block_tables, slots: `StepTensors`.
        num_seqs: sequences, padding included.
        covered: whether every row belongs to a sequence.
        plans: for each kind of layer what its kernels do; None = nothing.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    num_seqs: int
    covered: bool
    plans: dict[AttentionSpec, tuple[DecodePlan | None, PrefillPlan | None]]


class CudaBackend:
    """See the module's docstring."""

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda", *, kernels: Device | None = None) -> None:
        """Take a device.

        Args:
            device: a CUDA device of torch, or `emulated`: torch on the processor, kernels in the emulator, which is slow.
            kernels: another device for the kernels (tests).

        Raises:
            BackendError: there is no such device, or something is missing; one sentence says what to do.
        """
        name = "cuda" if device == "auto" else str(device)
        emulated = name == "emulated"
        if not emulated and name.partition(":")[0] != "cuda":
            raise BackendError(
                f"the cuda backend runs on a GPU, not on {name}; use --device cuda, or emulated to try it without one"
            )
        self._device: Device = kernels or (EmulatedDevice() if emulated else CudaDevice(name))
        self._place = torch.device("cpu" if emulated else name)
        # A processor multiplies float16 matrices in more builds of torch than bfloat16 ones, a GPU is mostly given bfloat16.
        self.ops = CudaOps(self._device, torch.float16 if emulated else torch.bfloat16)
        self._pool: CudaKVPool | None = None
        self._kinds: dict[AttentionSpec, _Kind] = {}
        self._specs: list[AttentionSpec] = []  # of each layer
        self._loaded: CudaMetadata | None = None

    @property
    def limits(self) -> Limits:
        """What the kernels are written for."""
        return Limits(self._place.type, frozenset({torch.bfloat16, torch.float16}), _HEAD_DIMS, _BLOCK_SIZES)

    def allocate_kv(self, spec: KVSpec) -> CudaKVPool:
        """Allocate the pool, zeroed, and compile what its layers need."""
        refusal = self.limits.refusal(spec)
        if refusal is not None:
            raise BackendError(refusal)
        self._pool, self._loaded = CudaKVPool(spec, self._place), None
        self._writer = KVWriter(self._device, spec.dtype)
        self._specs = [_attention_spec(layer, spec.dtype) for layer in spec.layers]
        self._kinds = {
            kind: self._kinds.get(kind) or _Kind(self._device, kind, self._place, _FEW_SEQS)
            for kind in dict.fromkeys(self._specs)
        }
        return self._pool

    def prepare(self, tensors: StepTensors) -> CudaMetadata:
        """Plan the step for each kind of layer, and bring its tensors to the device."""
        assert self._pool is not None, "allocate_kv comes first"
        query_start, seq_lens = tensors.query_start.numpy(), tensors.seq_lens.numpy()
        query_lens = np.diff(query_start)
        plans: dict[AttentionSpec, tuple[DecodePlan | None, PrefillPlan | None]] = {}
        for spec, kind in self._kinds.items():
            kind.make_room(len(seq_lens))
            few = (query_lens <= max(1, ROWS // spec.group)) | (seq_lens == 0)
            plans[spec] = (
                kind.decode.plan(query_start, seq_lens, chosen=few) if few.any() else None,
                None if few.all() else kind.prefill.plan(query_lens, seq_lens, chosen=~few),
            )
        metadata = CudaMetadata(
            query_start=self._placed(tensors.query_start),
            seq_lens=self._placed(tensors.seq_lens),
            block_tables=self._placed(tensors.block_tables),
            slots=self._placed(tensors.slots),
            num_seqs=len(seq_lens),
            covered=int(query_start[-1]) == len(tensors.slots),
            plans=plans,
        )
        self._load(metadata)
        return metadata

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: CudaMetadata,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v to their slots, then attend."""
        pool = self._pool
        assert pool is not None, "allocate_kv comes first"
        if metadata is not self._loaded:
            self._load(metadata)
        dtype, cache, spec = pool.spec.dtype, pool.caches[layer], self._specs[layer]
        kind = self._kinds[spec]
        self._writer.write(_readable(key, dtype, 4), _readable(value, dtype, 4), metadata.slots, cache)
        rows = _readable(query, dtype, 16)
        make = torch.empty if metadata.covered else torch.zeros
        out = make(query.shape, dtype=dtype, device=query.device)
        logits = sinks.float().contiguous() if sinks is not None else None
        decode, prefill = metadata.plans[spec]
        if decode is not None:
            kind.decode.launch(rows, cache, metadata.block_tables, out, sinks=logits)
        if prefill is not None:
            tables = (metadata.block_tables, metadata.query_start, metadata.seq_lens)
            kind.prefill.launch(rows, cache, *tables, out, sinks=logits)
        return out.to(query.dtype)

    def _load(self, metadata: CudaMetadata) -> None:
        """Make a step's plans the ones that launches follow."""
        for spec, (decode, prefill) in metadata.plans.items():
            kind = self._kinds[spec]
            if decode is not None:
                kind.make_room(metadata.num_seqs)
                kind.decode.load(decode)
            if prefill is not None:
                kind.prefill.load(prefill)
        self._loaded = metadata

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().to(self._place, non_blocking=True)


def _attention_spec(layer: LayerSpec, dtype: torch.dtype) -> AttentionSpec:
    plain = replace(layer, has_sinks=False)
    heads = (plain.num_heads, plain.num_kv_heads, plain.head_dim)
    return AttentionSpec(*heads, dtype, dtype, plain.scale, window=plain.window, soft_cap=plain.soft_cap)


def _readable(tensor: torch.Tensor, dtype: torch.dtype, unit: int) -> torch.Tensor:
    """In the pool's dtype, rows dense and at multiples of `unit` bytes; nearly always as it is."""
    tensor = tensor.to(dtype)
    return tensor if aligned(tensor, unit) else tensor.clone(memory_format=torch.contiguous_format)

"""Paged attention by CUDA kernels (kernels_cuda/), on a GPU or, for tests and for looking closely, emulated on a processor.

A step's sequences are divided: few new tokens are decoded, many are prefilled; each kernel has its plan of equal work, made once
a step for each kind of layer. Sequences that decode and begin with the same blocks attend to those together, which reads them
once for all. Then a layer is some launches: new keys and values to their slots, shared prefixes, decode, prefill, and what joins
pieces of one sequence.

What launches read of a step lies at addresses that stay until there is more of it than there was room for (`generation`). So a
CUDA graph of steps that only decode serves every later one with as many tokens and the same `CudaMetadata.signature`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from streamkv.attention import KVSpec, LayerSpec, Limits, StepTensors
from streamkv.errors import BackendError
from streamkv_backends.cuda.graphs import SIZES, CudaGraphs, RecordedPass, recorded_size
from streamkv_backends.cuda.ops import DTYPES, CudaOps
from streamkv_backends.cuda.pool import CudaKVPool
from streamkv_kernels.attention import AttentionSpec
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix
from streamkv_kernels.checks import aligned
from streamkv_kernels.cuda_device import CudaDevice
from streamkv_kernels.decode_plan import ROWS, DecodePlan
from streamkv_kernels.device import Device
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.kv_write import Angles, KVWriter, LayerCache
from streamkv_kernels.prefill_plan import PrefillPlan, SharedPlan, shared_prefixes
from streamkv_kernels.uploads import Room

__all__ = ["CudaBackend", "CudaMetadata"]

_HEAD_DIMS: Final = frozenset({64, 80, 96, 128, 256})
_BLOCK_SIZES: Final = frozenset({16, 32, 64})
_FEW_SEQS: Final = 64
"""For how many sequences there is room at first; it doubles when more come. Alike the next two."""
_FEW_TOKENS: Final = 8192
_FEW_BLOCKS: Final = 1024
"""Of a sequence."""

Signature = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """What the kernels of one kind of layer do in a step; None = nothing."""

    decode: DecodePlan | None
    shared: SharedPlan | None
    prefill: PrefillPlan | None


class _Kind:
    """The kernels for layers that are attended to alike."""

    def __init__(self, device: Device, spec: AttentionSpec, place: torch.device, max_seqs: int) -> None:
        self.spec, self._device, self._place = spec, device, place
        self.decode = DecodeAttention(device, spec, max_seqs, place)
        self.prefill = PrefillAttention(device, spec, place=place)
        self.shared = SharedPrefix(device, spec, place=place) if spec.window is None else None

    def plan(self, query_start: NDArray[np.int32], seq_lens: NDArray[np.int32], tables: NDArray[np.int32], size: int) -> _Work:
        """Divide a step; `size` is that of a block."""
        query_lens = np.diff(query_start)
        few = (query_lens <= max(1, ROWS // self.spec.group)) | (seq_lens == 0)
        begins, shared = None, None
        if self.shared is not None:
            groups = shared_prefixes(tables, np.where(few, (seq_lens - query_lens) // size, 0))
            if groups:
                begins = np.zeros_like(seq_lens)
                for members, blocks in groups:
                    begins[members] = blocks * size
                shared = self.shared.plan(groups, query_start, tables, size)
        return _Work(
            self.decode.plan(query_start, seq_lens, begins=begins, chosen=few) if few.any() else None,
            shared,
            None if few.all() else self.prefill.plan(query_lens, seq_lens, chosen=~few),
        )

    def load(self, work: _Work) -> bool:
        """Make it what launches follow; whether one that only decodes finds something at another address than before."""
        grew = [False]
        if work.decode is not None:
            if (num_seqs := len(work.decode.sequences)) > self.decode.max_seqs:
                self.decode = DecodeAttention(self._device, self.spec, 2 * num_seqs, self._place)
                grew.append(True)
            self.decode.load(work.decode)
        if work.shared is not None and self.shared is not None:
            grew.append(self.shared.load(work.shared))
        if work.prefill is not None:
            self.prefill.load(work.prefill)
        return any(grew)


@dataclass(frozen=True, slots=True)
class CudaMetadata:
    """One step.

    Attributes:
        tensors: `StepTensors`, on the CPU.
        covered: whether every row belongs to a sequence.
        work: for each kind of layer.
        signature: what a layer launches. Passes over equally many tokens and wanted rows that have the same one, and ran under
            the same `CudaBackend.generation`, are the same launches with the same arguments. None = such as no other step's:
            it prefills.
    """

    tensors: StepTensors
    covered: bool
    work: dict[AttentionSpec, _Work]
    signature: Signature | None


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
        self.ops = CudaOps(self._device, torch.bfloat16)
        self._graphs = CudaGraphs(self._device)
        self._pool: CudaKVPool | None = None
        self._kinds: dict[AttentionSpec, _Kind] = {}
        self._specs: list[AttentionSpec] = []  # of each layer
        self._loaded: CudaMetadata | None = None
        self.generation = 0
        """Counts how often something that launches read has got another address: CUDA graphs from before are worth nothing."""

    @property
    def limits(self) -> Limits:
        """What the kernels are written for."""
        return Limits(self._place.type, DTYPES, _HEAD_DIMS, _BLOCK_SIZES)

    def allocate_kv(self, spec: KVSpec) -> CudaKVPool:
        """Allocate the pool, zeroed, and compile what its layers need."""
        refusal = self.limits.refusal(spec)
        if refusal is not None:
            raise BackendError(refusal)
        self.ops = self.ops.of(spec.dtype) or self.ops
        self._pool, self._loaded = CudaKVPool(spec, self._place, self._device), None
        self._writer = KVWriter(self._device, spec.dtype)
        self._specs = [_attention_spec(layer, spec.dtype) for layer in spec.layers]
        self._kinds = {
            kind: self._kinds.get(kind) or _Kind(self._device, kind, self._place, _FEW_SEQS)
            for kind in dict.fromkeys(self._specs)
        }
        self._query_start = Room((_FEW_SEQS + 1,), torch.int32, self._place)
        self._seq_lens = Room((_FEW_SEQS,), torch.int32, self._place)
        self._block_tables = Room((_FEW_SEQS, min(spec.num_blocks, _FEW_BLOCKS)), torch.int32, self._place)
        self._slots = Room((_FEW_TOKENS,), torch.int64, self._place)
        self.generation += 1
        return self._pool

    def prepare(self, tensors: StepTensors) -> CudaMetadata:
        """Plan the step for each kind of layer, and bring its tensors to the device."""
        assert self._pool is not None, "allocate_kv comes first"
        query_start, seq_lens, tables = (part.numpy() for part in (tensors.query_start, tensors.seq_lens, tensors.block_tables))
        size = self._pool.spec.block_size
        work = {spec: kind.plan(query_start, seq_lens, tables, size) for spec, kind in self._kinds.items()}
        covered = int(query_start[-1]) == len(tensors.slots)
        signature: Signature | None = None
        if not any(one.prefill for one in work.values()):
            signature = (covered, *((one.decode is not None, one.shared and one.shared.launches) for one in work.values()))
        metadata = CudaMetadata(tensors, covered, work, signature)
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
        dtype, cache = self._cache(layer, metadata)
        self._writer.write(_readable(key, dtype, 4), _readable(value, dtype, 4), self._slots.filled, cache)
        return self._attend(query, layer, metadata, sinks)

    def rotate_and_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: int,
        metadata: CudaMetadata,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`Rotator`: rotating is part of the launch that writes k and v."""
        dtype, cache = self._cache(layer, metadata)
        query, key, value = (_readable(part, dtype, 4) for part in (query, key, value))
        angles = Angles(_readable(cos, dtype, 4).contiguous(), _readable(sin, dtype, 4).contiguous())
        turned = self._writer.rotate_and_write(query, key, value, self._slots.filled, cache, rope=angles)
        return self._attend(turned, layer, metadata, sinks)

    def _cache(self, layer: int, metadata: CudaMetadata) -> tuple[torch.dtype, LayerCache]:
        """Where a layer's keys and values go; launches follow the step from here on."""
        assert self._pool is not None, "allocate_kv comes first"
        if metadata is not self._loaded:
            self._load(metadata)
        return self._pool.spec.dtype, self._pool.caches[layer]

    def _attend(self, query: torch.Tensor, layer: int, metadata: CudaMetadata, sinks: torch.Tensor | None) -> torch.Tensor:
        """Over what is written already."""
        (dtype, cache), spec = self._cache(layer, metadata), self._specs[layer]
        kind, rows = self._kinds[spec], _readable(query, dtype, 16)
        make = torch.empty if metadata.covered else torch.zeros
        out = make(query.shape, dtype=dtype, device=query.device)
        logits = sinks.float().contiguous() if sinks is not None else None
        work, block_tables = metadata.work[spec], self._block_tables.filled
        prefix = kind.shared.launch(rows, cache) if work.shared is not None and kind.shared is not None else None
        if work.decode is not None:
            kind.decode.launch(rows, cache, block_tables, out, sinks=logits, prefix=prefix)
        if work.prefill is not None:
            tables = (block_tables, self._query_start.filled, self._seq_lens.filled)
            kind.prefill.launch(rows, cache, *tables, out, sinks=logits)
        return out.to(query.dtype)

    @property
    def recorded_ahead(self) -> tuple[int, ...]:
        """On a GPU every size: capturing one takes as long as many steps."""
        return SIZES if self._place.type == "cuda" else ()

    def recorded_size(self, num_tokens: int) -> int | None:
        """`graphs.recorded_size`."""
        return recorded_size(num_tokens)

    def recording_key(self, metadata: CudaMetadata) -> tuple[object, ...] | None:
        """What a recording is good for, beside its size; None = a step like this is not recorded."""
        return None if metadata.signature is None else (self.generation, metadata.signature)

    def record(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, RecordedPass | None]:
        """Run `function(*inputs)` over the step that was prepared last; its result, and the recording for `replay`."""
        return self._graphs.record(function, inputs)

    def replay(self, recorded: RecordedPass, inputs: tuple[torch.Tensor, ...], metadata: CudaMetadata) -> torch.Tensor | None:
        """Run a recorded pass again, over another step's sequences; as many tokens as when it was recorded.

        Returns:
            Its result, overwritten by the next replay; None if this step has to go through Python.
        """
        if metadata is not self._loaded:
            self._load(metadata)
        return recorded.replay(inputs)

    def _load(self, metadata: CudaMetadata) -> None:
        """Make a step the one that launches follow, in stream order."""
        tensors, size = metadata.tensors, self._pool.spec.block_size if self._pool is not None else 1
        used = -(-int(tensors.seq_lens.max()) // size)  # of the tables' columns
        grew = [
            self._query_start.load(tensors.query_start),
            self._seq_lens.load(tensors.seq_lens),
            self._block_tables.load(tensors.block_tables[:, :used]),
            self._slots.load(tensors.slots),
            *(self._kinds[spec].load(work) for spec, work in metadata.work.items()),
        ]
        self.generation += any(grew)
        self._loaded = metadata


def _attention_spec(layer: LayerSpec, dtype: torch.dtype) -> AttentionSpec:
    plain = replace(layer, has_sinks=False)
    heads = (plain.num_heads, plain.num_kv_heads, plain.head_dim)
    return AttentionSpec(*heads, dtype, dtype, plain.scale, window=plain.window, soft_cap=plain.soft_cap)


def _readable(tensor: torch.Tensor, dtype: torch.dtype, unit: int) -> torch.Tensor:
    """In the pool's dtype, rows dense and at multiples of `unit` bytes; nearly always as it is."""
    tensor = tensor.to(dtype)
    return tensor if aligned(tensor, unit) else tensor.clone(memory_format=torch.contiguous_format)

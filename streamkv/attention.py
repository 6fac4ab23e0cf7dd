"""Seam 2: what an attention backend is. A backend may import from `streamkv` this module and `streamkv.errors` only.

Life of a backend, always in the runner's one thread:

    backend = Backend(device)                    # raises BackendError with one sentence if it cannot work here
    pool = backend.allocate_kv(spec)             # all blocks at once; the layout is the backend's own business
    loop: metadata = backend.prepare(tensors)    # once a step
          out = backend.attend(q, k, v, layer, metadata)     # once a layer: writes k and v, then attends

Everything outside speaks of block ids; slot s of block b is the KV of one token in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from streamkv.fused import FusedOps

__all__ = ["AttentionBackend", "KVPool", "KVSpec", "LayerSpec", "Limits", "Recorder", "Rotator", "StepTensors"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention facts of one layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads` (MHA: equal, MQA: 1, GQA: between).
        head_dim: width of a head.
        scale: factor on q·k before the softmax.
        window: None = full attention; w = a token sees itself and the w - 1 tokens before it.
        soft_cap: None, or c: scores become c · tanh(score / c) (Gemma 2).
        has_sinks: the layer passes one learned logit per query head that joins the softmax with value 0 (GPT-OSS).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What to allocate: `num_blocks` blocks of `block_size` slots, one slot = one token in all `layers`."""

    num_blocks: int
    block_size: int
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        width = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers)
        return width * self.block_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend accepts, checked once at start; None = anything.

    Attributes:
        device: torch device type it runs on (`cpu`, `cuda`).
        dtypes: dtypes of q, k, v and of the pool.
        head_dims: supported head dimensions.
        block_sizes: supported block sizes.
        windows, soft_caps, sinks: whether sliding windows, soft-capping, attention sinks are supported.
    """

    device: str
    dtypes: frozenset[torch.dtype]
    head_dims: frozenset[int] | None = None
    block_sizes: frozenset[int] | None = None
    windows: bool = True
    soft_caps: bool = True
    sinks: bool = True

    def refusal(self, spec: KVSpec) -> str | None:
        """One sentence why `spec` cannot be served, or None if it can."""
        if spec.dtype not in self.dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
            return f"dtype {str(spec.dtype).removeprefix('torch.')} is not supported; use one of {names}"
        if self.block_sizes is not None and spec.block_size not in self.block_sizes:
            return f"block size {spec.block_size} is not supported; use one of {sorted(self.block_sizes)}"
        for index, layer in enumerate(spec.layers):
            if self.head_dims is not None and layer.head_dim not in self.head_dims:
                return f"head_dim {layer.head_dim} is not supported; supported are {sorted(self.head_dims)}"
            if layer.num_heads % layer.num_kv_heads:
                return f"layer {index}: {layer.num_heads} heads is no multiple of {layer.num_kv_heads} KV heads"
            if layer.window is not None and not self.windows:
                return f"layer {index} has a sliding window, which this backend lacks"
            if layer.soft_cap is not None and not self.soft_caps:
                return f"layer {index} soft-caps its scores, which this backend lacks"
            if layer.has_sinks and not self.sinks:
                return f"layer {index} has attention sinks, which this backend lacks"
        return None


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's packed batch as the runner lays it out; sequence i owns rows query_start[i] : query_start[i + 1].

    All on the CPU (a backend moves what it needs to its device), int32 but `slots`. Padding comes last: sequences of
    length 0, and rows with slot -1, which such a sequence may own or nobody; q, k, v hold anything there, NaN included.

    Attributes:
        query_start: [num_seqs + 1], prefix sums of the number of new tokens per sequence.
        seq_lens: [num_seqs], tokens whose KV is valid after this step's writes (context + new).
        block_tables: [num_seqs, max_blocks], block ids; entries past ceil(seq_len / block_size) are arbitrary and may be
            the id of no block.
        slots: [num_tokens] int64, block_id * block_size + offset where each new token's k and v go; -1 = nowhere.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor


@runtime_checkable
class KVPool(Protocol):
    """All blocks of one engine. Block ids are checked by the caller's `check`, not here; no ids at all are fine."""

    @property
    def spec(self) -> KVSpec:
        """What was allocated."""

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination), every layer; all sources are read before any destination is written."""

    def read(self, block_ids: list[int]) -> torch.Tensor:
        """A copy on the CPU, [len(block_ids), num_bytes] uint8, in an order that only `write` of the same backend knows."""

    def write(self, block_ids: list[int], data: torch.Tensor) -> None:
        """Inverse of `read`."""

    def fill(self, block_ids: list[int], value: float) -> None:
        """Fill whole blocks with one value: NaN to poison freed blocks (debug), 0 to clear after a numerical error."""


@runtime_checkable
class AttentionBackend(Protocol):
    """Attention over a paged KV pool. Not thread-safe: one runner thread owns it."""

    name: str

    @property
    def limits(self) -> Limits:
        """What it accepts."""

    @property
    def ops(self) -> FusedOps | None:
        """Fused functions in place of torch's modules; None = there are none."""

    def allocate_kv(self, spec: KVSpec) -> KVPool:
        """Allocate the pool, zeroed; `attend` uses the latest one.

        Raises:
            BackendError: `spec` is outside `limits`, or memory is short.
        """

    def prepare(self, tensors: StepTensors) -> Any:
        """Turn a step's tensors, which stay as they are, into metadata that every layer of this step shares."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: Any,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's k and v into the pool, then attend causally over each sequence's blocks.

        Args:
            query: [num_tokens, num_heads, head_dim], rotary embedding already applied; any strides.
            key: [num_tokens, num_kv_heads, head_dim].
            value: [num_tokens, num_kv_heads, head_dim].
            layer: index into `KVSpec.layers`.
            metadata: what `prepare` returned for this step.
            sinks: [num_heads], only for layers with `has_sinks`.

        Returns:
            [num_tokens, num_heads, head_dim], the dtype of `query`; padding rows are 0.
        """


@runtime_checkable
class Recorder(Protocol):
    """What a backend may be too: able to record a whole forward pass, to run it again without its Python.

    A pass takes token ids and positions, [1, num_tokens], and the rows whose logits are wanted, [num_wanted].
    """

    @property
    def recorded_ahead(self) -> tuple[int, ...]:
        """Numbers of tokens that are worth recording before a step has them, rising."""

    def recorded_size(self, num_tokens: int) -> int | None:
        """With how many tokens a pass over `num_tokens` is recorded: more = it is to be padded; None = it is not."""

    def recording_key(self, metadata: Any) -> Hashable | None:
        """What a recording of this step is good for beside its size: all steps with an equal key. None = it is not recorded."""

    def record(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any | None]:
        """Run `function(*inputs)` over the step that was prepared last, and write down what it does.

        Returns:
            Its result, and the recording; None if it cannot be run again.

        Raises:
            Exception: the pass has failed, or does what cannot be recorded.
        """

    def replay(self, recorded: Any, inputs: tuple[torch.Tensor, ...], metadata: Any) -> torch.Tensor | None:
        """Run a recording again, with inputs of the same shapes, over another step with an equal key.

        Returns:
            Its result, overwritten by the next replay; None if this step has to go through Python.
        """


@runtime_checkable
class Rotator(Protocol):
    """What a backend may be too: able to do the rotary embedding as it attends, one pass over queries and keys less."""

    def rotate_and_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: int,
        metadata: Any,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bit by bit what `attend` gives for what `FusedOps.rotate` gives.

        Args:
            query, key, value: as of `attend`, in the dtype of the backend's `ops`, but not rotated.
            cos, sin: [num_tokens, head_dim], as of `FusedOps.rotate`.
            layer, metadata, sinks: as of `attend`.
        """

"""Paged attention in plain PyTorch: any device, any shape. The fallback, and the oracle for every other backend.

Reads exactly the slots that are valid, never a padded batch: what lies in unused slots (NaN, after a fault) cannot reach any
output, and in float32 a sequence's result does not depend on what is batched beside it.

    pool        per layer [2, num_blocks, block_size, num_kv_heads, head_dim]: a token's heads lie side by side, so that the
                gather of a context copies whole rows
    decode      queries of one KV head's group become the rows of one small matrix; sequences of about the same length share a
                call, [n, num_kv_heads, group, head_dim], filled up with a slot of their own that a mask hides
    chunk       the group is the batch dimension and the keys are expanded with stride 0, nothing is copied
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  # the name everybody knows

from streamkv.attention import KVSpec, LayerSpec, Limits, StepTensors
from streamkv.errors import BackendError
from streamkv_backends.tensor_pool import TensorPool

__all__ = ["TorchBackend", "TorchKVPool", "TorchMetadata"]


class TorchKVPool(TensorPool):
    """All blocks, one tensor a layer."""

    def __init__(self, spec: KVSpec, device: torch.device) -> None:
        """[2, num_blocks, block_size, num_kv_heads, head_dim] a layer."""
        shapes = [(2, spec.num_blocks, spec.block_size, layer.num_kv_heads, layer.head_dim) for layer in spec.layers]
        super().__init__(spec, device, shapes, block_dim=1)
        self._flat = [tensor.flatten(1, 2) for tensor in self.layers]  # [2, num_slots, num_kv_heads, head_dim]

    def slots(self, layer: int) -> torch.Tensor:
        """[2, num_blocks * block_size, num_kv_heads, head_dim]: keys and values of a layer, by slot."""
        return self._flat[layer]


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence of a step: its query rows start:end, and the slots of its context, [seq_len]."""

    start: int
    end: int
    slots: torch.Tensor

    @property
    def new(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one new token each that see about the same number of tokens.

    Attributes:
        rows: [n] their packed query rows.
        slots: [n * width] what they see, filled up.
        mask: [n, 1, 1, width] additive, -inf where it is filled up.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


@dataclass(slots=True)
class TorchMetadata:
    """One step, made once and shared by its layers.

    Attributes:
        sequences: the non-empty ones.
        singles: [n, 2] of those with one new token: the query row, the length.
        tables: [n, max_blocks] theirs.
        writes: [num_written] rows of k and v that have a slot.
        slots: [num_written] where they go.
        masks: (context, new, window) -> [new, context] additive mask; sequences of equal shape share it.
        decodes: `singles` grouped, by window.
    """

    sequences: list[_Sequence]
    singles: torch.Tensor
    tables: torch.Tensor
    num_tokens: int
    writes: torch.Tensor | None
    slots: torch.Tensor
    covers_all: bool
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    decodes: dict[int | None, list[_Decodes]] = field(default_factory=dict)


class TorchBackend:
    """See the module's docstring."""

    name = "torch"
    ops = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Use a device that torch can see.

        Raises:
            BackendError: torch has no such device.
        """
        try:
            self._device = torch.device("cpu" if device == "auto" else device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA raises AssertionError
            sees = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
            raise BackendError(f"device {str(device)!r} is asked for and torch sees {sees}; use --device cpu") from error
        self._pool: TorchKVPool | None = None
        self._room = [torch.empty(0, device=self._device)] * 2

    @property
    def limits(self) -> Limits:
        """Anything, in the dtypes that torch multiplies well."""
        return Limits(self._device.type, frozenset({torch.float32, torch.bfloat16, torch.float16}))

    def allocate_kv(self, spec: KVSpec) -> TorchKVPool:
        """Allocate the pool, zeroed."""
        refusal = self.limits.refusal(spec)
        if refusal is not None:
            raise BackendError(refusal)
        self._pool = TorchKVPool(spec, self._device)
        return self._pool

    def prepare(self, tensors: StepTensors) -> TorchMetadata:
        """Resolve block tables to slots, once for all layers."""
        assert self._pool is not None, "allocate_kv comes first"
        size = self._pool.spec.block_size
        starts, lengths = tensors.query_start.tolist(), tensors.seq_lens.tolist()
        sequences: list[_Sequence] = []
        tables = tensors.block_tables.long() * size
        offsets = torch.arange(size)
        for index, length in enumerate(lengths):
            if length == 0 or starts[index] == starts[index + 1]:
                continue
            blocks = tables[index, : -(-length // size), None]  # [num_blocks, 1]
            slots = (blocks + offsets).flatten()[:length]
            sequences.append(_Sequence(starts[index], starts[index + 1], slots.to(self._device)))
        single = (tensors.query_start.diff() == 1) & (tensors.seq_lens > 0)
        written = tensors.slots >= 0
        everything = bool(written.all())
        return TorchMetadata(
            sequences=sequences,
            singles=torch.stack([tensors.query_start[:-1][single], tensors.seq_lens[single]], dim=1).long(),
            tables=tables[single],
            num_tokens=len(tensors.slots),
            writes=None if everything else written.nonzero().flatten().to(self._device),
            slots=(tensors.slots if everything else tensors.slots[written]).to(self._device),
            covers_all=sum(sequence.new for sequence in sequences) == len(tensors.slots),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: TorchMetadata,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v, gather every context, attend sequence by sequence."""
        assert self._pool is not None, "allocate_kv comes first"
        spec = self._pool.spec.layers[layer]
        keys, values = self._pool.slots(layer)
        if metadata.writes is not None:
            key, value = key[metadata.writes], value[metadata.writes]
        keys.index_copy_(0, metadata.slots, key.to(keys.dtype))
        values.index_copy_(0, metadata.slots, value.to(values.dtype))
        shape = (metadata.num_tokens, spec.num_heads, spec.head_dim)
        output = query.new_empty(shape) if metadata.covers_all else query.new_zeros(shape)
        plain = spec.soft_cap is None and sinks is None
        if plain and len(metadata.singles):
            for group in self._decodes(metadata, spec.window, query.dtype):
                context = self._gather(keys, values, group.slots)
                output[group.rows] = _decode(query[group.rows], *context, group.mask, spec)
        for sequence in metadata.sequences:
            if plain and sequence.new == 1:
                continue
            # A token further back than the window is seen by nobody in this step.
            first = 0 if spec.window is None else max(0, len(sequence.slots) - spec.window - sequence.new + 1)
            context = self._gather(keys, values, sequence.slots[first:])
            rows = query[sequence.start : sequence.end]
            target = output[sequence.start : sequence.end]
            target.copy_(self._chunk(rows, *context, spec, metadata) if plain else _explicit(rows, *context, spec, sinks))
        return output

    def _gather(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `slots`, [len(slots), num_kv_heads, head_dim] each; overwritten by the next call.

        Always in the same memory: to get as much of it anew from the system takes longer than to copy into it.
        """
        count = len(slots) * keys[0].numel()
        if len(self._room[0]) < count or self._room[0].dtype is not keys.dtype:
            self._room = [torch.empty(count + count // 4, dtype=keys.dtype, device=self._device) for _ in range(2)]
        key, value = (
            torch.index_select(every, 0, slots, out=room[:count].view(len(slots), *every.shape[1:]))
            for every, room in zip((keys, values), self._room, strict=True)
        )
        return key, value

    def _decodes(self, metadata: TorchMetadata, window: int | None, dtype: torch.dtype) -> list[_Decodes]:
        """Sequences with one new token, in groups of the same width: a sequence's width depends on nothing but itself."""
        assert self._pool is not None, "allocate_kv comes first"
        if window not in metadata.decodes:
            size, groups = self._pool.spec.block_size, []
            lengths = metadata.singles[:, 1]
            seen = lengths if window is None else lengths.clamp(max=window)
            widths = [_width(length) for length in seen.tolist()]
            for width in sorted(set(widths)):
                members = torch.tensor([index for index, own in enumerate(widths) if own == width])
                place = torch.arange(width)  # [width]
                hidden = place >= seen[members, None]  # [n, width]
                first = (lengths - seen)[members, None]
                position = torch.where(hidden, first, first + place)
                slots = metadata.tables[members].gather(1, position // size) + position % size
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
                rows = metadata.singles[members, 0]
                groups.append(_Decodes(*(tensor.to(self._device) for tensor in (rows, slots.flatten(), mask))))
            metadata.decodes[window] = groups
        return metadata.decodes[window]

    def _chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec, metadata: TorchMetadata
    ) -> torch.Tensor:
        """Several new tokens of one sequence; [new, num_heads, head_dim]."""
        new, context = len(query), len(key)
        group = spec.num_heads // spec.num_kv_heads
        folded = query.view(new, spec.num_kv_heads, group, spec.head_dim).permute(2, 1, 0, 3)  # [group, kv_heads, new, dim]
        expanded = (group, spec.num_kv_heads, context, spec.head_dim)
        keys, values = key.transpose(0, 1).expand(expanded), value.transpose(0, 1).expand(expanded)
        if new == context and (spec.window is None or spec.window >= context):
            result = F.scaled_dot_product_attention(folded, keys, values, is_causal=True, scale=spec.scale)
        else:
            shape = (context, new, spec.window)
            if shape not in metadata.masks:
                metadata.masks[shape] = _mask(context, new, spec.window, query)
            result = F.scaled_dot_product_attention(folded, keys, values, attn_mask=metadata.masks[shape], scale=spec.scale)
        return result.permute(2, 1, 0, 3).reshape(new, spec.num_heads, spec.head_dim)


def _width(length: int) -> int:
    """What a context is filled up to: an eighth more at most, but 64 at least."""
    step = 64
    while length > 8 * step:
        step *= 2
    return -(-length // step) * step


def _decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """One new token for each of n sequences, which see n * width slots between them; [n, num_heads, head_dim]."""
    count, shared = len(query), spec.num_heads // spec.num_kv_heads
    key, value = (part.view(count, -1, spec.num_kv_heads, spec.head_dim).transpose(1, 2) for part in (key, value))
    # enable_gqa on strided views is many times slower than rows of one matrix (docs/backends.md).
    rows = query.reshape(count, spec.num_kv_heads, shared, spec.head_dim)
    result = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=spec.scale)
    return result.reshape(count, spec.num_heads, spec.head_dim)


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Scores in the open, in float32, for what the fused function lacks: soft-capping and sinks. [new, num_heads, head_dim]."""
    new, context = len(query), len(key)
    group = spec.num_heads // spec.num_kv_heads
    keys = key.float().repeat_interleave(group, dim=1).transpose(0, 1)  # [num_heads, context, head_dim]
    values = value.float().repeat_interleave(group, dim=1).transpose(0, 1)
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * spec.scale  # [num_heads, new, context]
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    scores = scores + _mask(context, new, spec.window, scores)
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(-1, new, 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :context]
    return (weights @ values).transpose(0, 1)


def _mask(context: int, new: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[new, context] additive: 0 where the new token may look, -inf elsewhere. The last new token is the last of the context."""
    position = torch.arange(context - new, context, device=like.device)[:, None]
    other = torch.arange(context, device=like.device)[None]
    hidden = other > position
    if window is not None:
        hidden |= other <= position - window
    return torch.zeros((new, context), dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)

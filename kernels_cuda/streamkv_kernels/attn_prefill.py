"""Host side of attn_prefill.cu: attention of sequences with many new tokens, and of many sequences to a prefix they share.

    prefill = PrefillAttention(device, spec)
    prefill.load(prefill.plan(query_lens, seq_lens))                            # once a step
    prefill.launch(query, cache, block_tables, query_start, seq_lens, out)      # once a layer

Cascade: what a group of sequences has in common is read once for all of them, and joins the rest as a state.

    shared = SharedPrefix(device, spec)
    shared.load(shared.plan(groups, query_start, block_tables, block_size))     # groups of prefill_plan.shared_prefixes
    prefix = shared.launch(query, cache)                                        # for the `prefix` of decode and prefill

What launches read lies at addresses that stay until a plan needs more room, which `load` tells; plans of shared prefixes come in
few sizes. So a CUDA graph of `SharedPrefix.launch` serves every step whose plan has the same `launches`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from streamkv_kernels.attention import TILE, AttentionSpec, MergeStates, States, attention_arguments, output_arguments
from streamkv_kernels.checks import check
from streamkv_kernels.device import Argument, Device, Kernel, Variant
from streamkv_kernels.kv_write import LayerCache
from streamkv_kernels.prefill_plan import ROWS, Ints, PrefillPlan, Shape, SharedPlan, plan_prefill, plan_shared
from streamkv_kernels.uploads import Room

__all__ = ["PrefillAttention", "SharedPrefix"]

_THREADS: Final = 128
_FEW: Final = 256
"""Lines of plans that there is room for at first."""


class _Pieces:
    """The kernel, in the sizes that plans may ask for, and a plan on the device."""

    def __init__(self, device: Device, spec: AttentionSpec, max_rows: int, place: torch.device | str) -> None:
        self.spec, self.place = spec, place
        # Wider heads leave no registers for two row tiles a warp, nor do 8-bit caches, whose numbers pass through some.
        most = max_rows if spec.head_dim <= (128 if spec.cache_dtype.itemsize == 2 else 96) else ROWS[0]
        self.shape = Shape(spec.group, spec.num_kv_heads, device.num_sms, most)
        self._kernels: dict[int, Kernel] = {}
        for rows in ROWS:
            if rows <= most:
                variant = Variant("attn_prefill", (*spec.defines, ("ROW_TILES", rows // ROWS[0])))
                self._kernels[rows] = device.kernel(variant, "attn_prefill", _shared_bytes(spec, rows))
        self._pieces, self._merges = (Room((_FEW, 8), torch.int32, place) for _ in range(2))
        self._outs, self._logarithms = (Room((0,), torch.float32, place) for _ in range(2))
        self.load(PrefillPlan(ROWS[0], np.zeros((0, 8), np.int32), 0, np.zeros((0, 8), np.int32)))

    def load(self, plan: PrefillPlan) -> bool:
        """Whether something has another address than before."""
        self.plan = plan
        width, states = self.spec.head_dim, plan.num_states * plan.rows
        grew = [
            self._pieces.load(torch.from_numpy(plan.pieces)),
            self._merges.load(torch.from_numpy(plan.merges)),
            self._outs.reserve(states * width),
            self._logarithms.reserve(states),
        ]
        self.states = States(
            self._outs.tensor[: states * width].view(plan.num_states, plan.rows, width),
            self._logarithms.tensor[:states].view(plan.num_states, plan.rows),
        )
        return any(grew)

    @property
    def merges(self) -> torch.Tensor:
        return self._merges.filled

    def launch(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        outputs: tuple[Argument, ...],
        *,
        row_index: torch.Tensor | None,
    ) -> None:
        """tables: block tables, query_start, lengths. Causal unless there is a row_index.

        Raises:
            ValueError: an argument does not fit; the sentence names it.
        """
        spec, (block_tables, query_start, lengths) = self.spec, tables
        pieces = self._pieces.filled
        plan = (query_start, lengths, row_index, pieces)
        arguments = attention_arguments(spec, query, cache, block_tables, plan, outputs, self.states, unit=16)
        check("query_start", query_start, torch.int32, [len(block_tables) + 1])
        check("seq_lens", lengths, torch.int32, [len(block_tables)])
        if not len(pieces):
            return
        grid = (len(pieces) * spec.num_kv_heads, 1, 1)
        self._kernels[self.plan.rows].launch(grid, (_THREADS, 1, 1), *arguments, int(row_index is None))


class PrefillAttention:
    """Causal attention of new tokens, for layers of one kind."""

    def __init__(self, device: Device, spec: AttentionSpec, *, max_rows: int = 128, place: torch.device | str = "cpu") -> None:
        """Compile.

        Args:
            max_rows: 64 compiles half as much; for tests.
            place: where the tensors are.

        Raises:
            BackendError: the kernels cannot be compiled.
        """
        self.spec = spec
        self._pieces = _Pieces(device, spec, max_rows, place)
        self._merge = MergeStates(device, spec.head_dim, spec.dtype)

    def plan(
        self, query_lens: Ints, seq_lens: Ints, *, chosen: NDArray[np.bool_] | None = None, prefix_lens: Ints | None = None
    ) -> PrefillPlan:
        """Plan a step; `plan_prefill`."""
        window = self.spec.window
        return plan_prefill(query_lens, seq_lens, self._pieces.shape, window=window, chosen=chosen, prefix_lens=prefix_lens)

    def load(self, plan: PrefillPlan) -> bool:
        """Make a plan the one that launches follow, in stream order; whether something has another address than before."""
        return self._pieces.load(plan)

    def launch(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        out: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
        prefix: States | None = None,
        logarithms: torch.Tensor | None = None,
    ) -> None:
        """Attend.

        Args:
            query: [num_tokens, num_heads, head_dim], the last dimension dense, rows at multiples of 16 bytes.
            cache: the layer's keys and values; their block size is a multiple of 16.
            block_tables: [num_seqs, max_blocks] int32.
            query_start: [num_seqs + 1] int32, first row of each sequence's new tokens.
            seq_lens: [num_seqs] int32, tokens after this step.
            out: like query, contiguous: rows of the plan's sequences are written, others left as they are.
            sinks, prefix, logarithms: `output_arguments`; the prefix joins rows of sequences with a `prefix_len`.

        Raises:
            ValueError: an argument does not fit; the sentence names it.
        """
        spec, pieces = self.spec, self._pieces
        check("out", out, spec.dtype, query.shape)
        outputs = output_arguments(spec.head_dim, out, sinks, prefix, logarithms)
        pieces.launch(query, cache, (block_tables, query_start, seq_lens), outputs, row_index=None)
        if len(pieces.merges):
            self._merge.bind(
                pieces.states, pieces.merges, out, spec.num_kv_heads, sinks=sinks, prefix=prefix, logarithms=logarithms
            ).launch()


class SharedPrefix:
    """Attention, not causal, of all rows of a group of sequences to the blocks they have in common. Layers without a window."""

    def __init__(self, device: Device, spec: AttentionSpec, *, max_rows: int = 128, place: torch.device | str = "cpu") -> None:
        """Compile; arguments as of `PrefillAttention`.

        Raises:
            ValueError: the layers have a window: their rows do not all see the prefix.
            BackendError: the kernels cannot be compiled.
        """
        if spec.window is not None:
            raise ValueError(f"window is {spec.window}, and a shared prefix is for layers without one")
        self.spec, self.place = spec, place
        self._pieces = _Pieces(device, spec, max_rows, place)
        self._merge = MergeStates(device, spec.head_dim, torch.float32)
        shapes = ((_FEW, _FEW), (_FEW + 1,), (_FEW,), (_FEW,))  # block tables, row_start, lengths, row_index
        self._rooms = tuple(Room(shape, torch.int32, place) for shape in shapes)

    def plan(
        self, groups: list[tuple[list[int], int]], query_start: Ints, block_tables: NDArray[np.int32], block_size: int
    ) -> SharedPlan:
        """Plan a step.

        Args:
            groups: for each its sequences and how many leading blocks they have in common, `shared_prefixes`.
            query_start: [num_seqs + 1], first row of each sequence's new tokens.
            block_tables: [num_seqs, max_blocks].
            block_size: tokens of a block.
        """
        return plan_shared(groups, query_start, block_tables, block_size, self._pieces.shape)

    def load(self, plan: SharedPlan) -> bool:
        """Make a plan the one that launches follow, in stream order; whether something has another address than before."""
        grew = [self._pieces.load(plan.pieces)]
        arrays = (plan.block_tables, plan.row_start, plan.lengths, plan.row_index)
        grew += [room.load(torch.from_numpy(numbers)) for room, numbers in zip(self._rooms, arrays, strict=True)]
        return any(grew)

    def launch(self, query: torch.Tensor, cache: LayerCache) -> States:
        """States [num_tokens, num_heads] of the groups' rows; those of others are arbitrary.

        Raises:
            ValueError: an argument does not fit; the sentence names it.
        """
        spec, pieces = self.spec, self._pieces
        states = States(
            torch.empty(query.shape, dtype=torch.float32, device=query.device),
            torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
        )
        block_tables, row_start, lengths, row_index = (room.filled for room in self._rooms)
        nothing = (None,) * 5  # every piece leaves a state
        pieces.launch(query, cache, (block_tables, row_start, lengths), nothing, row_index=row_index)
        if len(pieces.merges):
            self._merge.bind(
                pieces.states,
                pieces.merges,
                states.out,
                spec.num_kv_heads,
                row_index=row_index,
                logarithms=states.logarithms,
            ).launch()
        return states


def _shared_bytes(spec: AttentionSpec, rows: int) -> int:
    span = 64 if spec.head_dim <= 128 else 32
    return rows * spec.head_dim * spec.dtype.itemsize + 2 * (span // TILE) * spec.tile_bytes

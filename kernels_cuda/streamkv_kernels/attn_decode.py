"""Host side of attn_decode.cu and attn_merge.cu: attention of sequences with few new tokens.

    decode = DecodeAttention(device, AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, scale=128**-0.5), max_seqs=256)
    decode.load(decode.plan(query_start, seq_lens))            # once a step
    decode.launch(query, cache, block_tables, out)             # once a layer

Everything that changes from step to step lies in tensors whose addresses stay, and the grids are constant: a CUDA graph of
`launch` serves every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from streamkv_kernels.attention import AttentionSpec, BoundLaunch, MergeStates, States, attention_arguments, output_arguments
from streamkv_kernels.checks import check
from streamkv_kernels.decode_plan import ROWS, DecodePlan, Ints, plan_decode
from streamkv_kernels.device import Device, Kernel, Variant
from streamkv_kernels.kv_write import LayerCache
from streamkv_kernels.uploads import upload

__all__ = ["BoundDecode", "DecodeAttention"]

_BLOCKS_PER_SM: Final = 2
_RING_BYTES: Final = 72 << 10
"""Of shared memory that a third stage may not exceed: two blocks must fit on a multiprocessor."""


@dataclass(frozen=True, slots=True)
class BoundDecode:
    """Both kernels, to be launched with the plan that was loaded last as long as their tensors live where they are.

    Attributes:
        attend: the first: whole jobs write their rows, others leave states.
        merge: the second joins them.
    """

    attend: BoundLaunch
    merge: BoundLaunch

    def launch(self) -> None:
        """Run them."""
        self.attend.launch()
        self.merge.launch()


class DecodeAttention:
    """Attention of few new tokens, for layers of one kind."""

    def __init__(self, device: Device, spec: AttentionSpec, max_seqs: int, place: torch.device | str = "cpu") -> None:
        """Compile, and allocate what a step needs.

        Args:
            max_seqs: sequences of a step at most.
            place: where the tensors are.

        Raises:
            BackendError: the kernels cannot be compiled.
        """
        self.spec, self.max_seqs = spec, max_seqs
        self.num_shares = _BLOCKS_PER_SM * device.num_sms
        self._warps, stages, shared_bytes = _geometry(spec)
        variant = Variant("attn_decode", (*spec.defines, ("WARPS", self._warps), ("STAGES", stages)))
        self._decode: Kernel = device.kernel(variant, "attn_decode", shared_bytes)
        self._merge = MergeStates(device, spec.head_dim, spec.dtype)
        rows = max_seqs + 2 * self.num_shares
        self._staging: Ints = np.zeros((rows, 8), dtype=np.int32)
        self._plan = torch.zeros((rows, 8), dtype=torch.int32, device=place)
        self._sequences, self._shares = self._plan[:max_seqs], self._plan[max_seqs : max_seqs + self.num_shares]
        self._merges = self._plan[max_seqs + self.num_shares :]
        self._states = States(
            torch.zeros((2 * self.num_shares, ROWS, spec.head_dim), dtype=torch.float32, device=place),
            torch.zeros((2 * self.num_shares, ROWS), dtype=torch.float32, device=place),
        )

    def plan(
        self,
        query_start: Ints,
        seq_lens: Ints,
        *,
        begins: Ints | None = None,
        chosen: NDArray[np.bool_] | None = None,
    ) -> DecodePlan:
        """Plan a step; `plan_decode`."""
        spec = self.spec
        return plan_decode(
            query_start,
            seq_lens,
            group=spec.group,
            num_kv_heads=spec.num_kv_heads,
            num_shares=self.num_shares,
            window=spec.window,
            begins=begins,
            chosen=chosen,
        )

    def load(self, plan: DecodePlan) -> None:
        """Make a plan the one that launches follow, in stream order.

        Raises:
            ValueError: it has too many sequences.
        """
        if len(plan.sequences) > self.max_seqs:
            raise ValueError(f"the plan has {len(plan.sequences)} sequences, and max_seqs is {self.max_seqs}")
        staging, shares, merges = self._staging, self.max_seqs, self.max_seqs + self.num_shares
        staging[: len(plan.sequences)] = plan.sequences
        staging[shares:merges] = plan.shares
        staging[merges : merges + len(plan.merges)] = plan.merges
        staging[merges + len(plan.merges) :] = 0
        upload(self._plan, torch.from_numpy(staging))

    def bind(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        block_tables: torch.Tensor,
        out: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
        prefix: States | None = None,
        logarithms: torch.Tensor | None = None,
    ) -> BoundDecode:
        """Check everything, and pack it for launches.

        Args:
            query: [num_tokens, num_heads, head_dim], the last dimension dense, rows at multiples of 4 bytes.
            cache: the layer's keys and values; their block size is a multiple of 16.
            block_tables: [num_seqs, max_blocks] int32.
            out: like query, contiguous: rows of the plan's sequences are written, others left as they are.
            sinks, prefix, logarithms: `output_arguments`; the prefix joins rows of sequences with `begins` over 0.

        Raises:
            ValueError: an argument does not fit; the sentence names it.
        """
        spec = self.spec
        check("out", out, spec.dtype, query.shape)
        plan, outputs = (self._sequences, self._shares), output_arguments(spec.head_dim, out, sinks, prefix, logarithms)
        arguments = attention_arguments(spec, query, cache, block_tables, plan, outputs, self._states, unit=4)
        merge = self._merge.bind(
            self._states, self._merges, out, spec.num_kv_heads, sinks=sinks, prefix=prefix, logarithms=logarithms
        )
        attend = BoundLaunch(self._decode.bind(*arguments), (self.num_shares, 1, 1), (32 * self._warps, 1, 1))
        return BoundDecode(attend, merge)

    def launch(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        block_tables: torch.Tensor,
        out: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
        prefix: States | None = None,
        logarithms: torch.Tensor | None = None,
    ) -> None:
        """Bind, and launch once."""
        self.bind(query, cache, block_tables, out, sinks=sinks, prefix=prefix, logarithms=logarithms).launch()


def _geometry(spec: AttentionSpec) -> tuple[int, int, int]:
    """Warps and stages of the decode kernel, and its shared memory: for rings and queries, or at the end for states of warps."""
    warps = 4 if spec.head_dim * spec.cache_dtype.itemsize <= 256 else 2
    stages = 3 if warps * 3 * spec.tile_bytes <= _RING_BYTES else 2
    query = ROWS * spec.head_dim * spec.dtype.itemsize if spec.head_dim > 128 else 0
    return warps, stages, max(warps * stages * spec.tile_bytes + query, warps * ROWS * (spec.head_dim + 8 + 2) * 4)

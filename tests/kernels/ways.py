"""The two ways in which kernels attend, behind one call: decode's, made for few new tokens, and prefill's, made for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention
from streamkv_kernels.emulated import EmulatedDevice
from tests.kernels.paged import Paged

__all__ = ["WAYS", "Way", "decode", "prefill"]


def decode(
    device: EmulatedDevice, batch: Paged, *, chosen: list[int] | None = None, begins: np.ndarray | None = None, **changes: Any
) -> torch.Tensor:
    """Attend as decode does; `changes`: of and beside the arguments that the batch gives."""
    kernels = DecodeAttention(device, batch.spec, len(batch.lengths))
    kernels.load(kernels.plan(batch.query_start, batch.seq_lens, begins=begins, chosen=_mask(batch, chosen)))
    arguments = _arguments(batch) | changes
    bound = kernels.bind(**arguments)
    bound.attend.launch()
    _no_lane_waits_for_a_bank(device)
    bound.merge.launch()
    return arguments["out"]


def prefill(
    device: EmulatedDevice,
    batch: Paged,
    *,
    chosen: list[int] | None = None,
    begins: np.ndarray | None = None,
    max_rows: int = 64,
    **changes: Any,
) -> torch.Tensor:
    """Attend as prefill does; arguments as of `decode`."""
    kernels = PrefillAttention(device, batch.spec, max_rows=max_rows)
    plan = kernels.plan(np.diff(batch.query_start), batch.seq_lens, chosen=_mask(batch, chosen), prefix_lens=begins)
    kernels.load(plan)
    own = {"query_start": torch.from_numpy(batch.query_start), "seq_lens": torch.from_numpy(batch.seq_lens)}
    arguments = _arguments(batch) | own | changes
    kernels.launch(**arguments)
    if len(plan.pieces) and not len(plan.merges):  # else the counters are the merge's
        _no_lane_waits_for_a_bank(device)
    return arguments["out"]


@dataclass(frozen=True)
class Way:
    """A way, and batches that are its own.

    Attributes:
        run: `decode` or `prefill`.
        ragged: (new tokens, tokens) around a tile, a span and a block, with a context, with padding; in several pieces.
        few: a smaller batch, for tables of everything else.
    """

    run: Callable[..., torch.Tensor]
    ragged: list[tuple[int, int]]
    few: list[tuple[int, int]]


WAYS: Final = {
    "decode": Way(
        decode,
        [(1, 1), (1, 15), (1, 16), (1, 17), (1, 32), (3, 33), (16, 16), (16, 170), (1, 1300), (1, 0), (2, 65), (1, 130)],
        [(1, 1), (1, 40), (4, 64), (1, 63), (2, 300)],
    ),
    "prefill": Way(
        prefill,
        [(1, 1), (15, 15), (16, 17), (17, 64), (33, 65), (0, 9), (1, 130), (2, 0), (70, 200), (5, 16), (64, 128)],
        [(1, 1), (40, 40), (9, 64), (30, 95)],
    ),
}


def _arguments(batch: Paged) -> dict[str, Any]:
    return {"query": batch.query, "cache": batch.cache, "block_tables": batch.block_tables, "out": batch.out()}


def _mask(batch: Paged, chosen: list[int] | None) -> np.ndarray | None:
    return None if chosen is None else np.isin(np.arange(len(batch.lengths)), chosen)


def _no_lane_waits_for_a_bank(device: EmulatedDevice) -> None:
    turns, loads = device.counters["ldmatrix_wavefronts"], device.counters["ldmatrix"]
    assert turns == 4 * loads > 0, f"{turns} turns of banks for {loads} ldmatrix"

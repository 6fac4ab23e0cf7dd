"""Sampling by the backend's own functions (`streamkv.fused.SamplingOps`): what these are given of a batch.

Equal to torch's way (`sampling_draw` and the tables' `apply`) in what it computes. Lists of tokens are joined, one row after the
other; what does not change as long as the batch has the same rows lies on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from streamkv.fused import LogitChanges
from streamkv.runner.sampling_history import PenaltyTables
from streamkv.runner.sampling_masks import Listed, MaskBatch, MaskTables
from streamkv.runner.transfer import upload

__all__ = ["FusedChanges", "Parameters", "parameters_of"]

_Ints = npt.NDArray[np.int64]


class Parameters(NamedTuple):
    """How rows are sampled, [num_rows] each, as `SamplingOps.sample` takes them."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    seed: torch.Tensor
    branch: torch.Tensor


def parameters_of(own: npt.NDArray[np.void], device: torch.device) -> Parameters:
    """Those of a batch, in one copy to the device.

    Args:
        own: [num_rows], as `RowSampler` keeps them. Rows with typical-p are given the most probable token: torch draws theirs.
    """
    temperature = np.where(own["typical_p"] < 1, np.float32(0), own["temperature"])
    least = torch.from_numpy(own["min_p"].copy()).log().numpy()
    top_k, top_p, seed, branch = (own[name].copy() for name in ("top_k", "top_p", "seed", "branch"))  # columns lie at odd strides
    return Parameters(*upload([temperature, top_k, top_p, least, seed, branch], device))


class FusedChanges:
    """What is done to the logits of a batch, as long as it has the same rows. Lists are in the order of the entries."""

    def __init__(
        self, rows: _Ints, penalties: PenaltyTables, masks: MaskTables, of_masks: MaskBatch | None, device: torch.device
    ) -> None:
        """What is the same with every step goes to the device."""
        self._rows, self._penalties, self._masks, self._of_masks, self._device = rows, penalties, masks, of_masks, device
        self._fixed = LogitChanges()
        factors = penalties.factors(rows)
        if factors is not None:
            self._fixed = replace(self._fixed, penalties=upload([factors], device)[0])
        if of_masks is not None:
            self._fixed = replace(self._fixed, **self._fixed_masks(of_masks))

    def _fixed_masks(self, masks: MaskBatch) -> dict[str, Any]:
        fixed: dict[str, Any] = {}
        if len(masks.bias.ids):
            fixed["bias"] = tuple(upload([*self._joined(masks.bias), masks.bias_values], self._device))
        if len(masks.restricted):
            fixed["allowed"] = upload([self._masks.bits(masks)], self._device)[0]
        if len(masks.bad.ids):
            fixed["banned"] = tuple(upload(self._joined(masks.bad), self._device))
        return fixed

    def now(self, positions: _Ints) -> tuple[LogitChanges, torch.Tensor]:
        """Those of a step that samples tokens at these positions, and the positions, all in one copy to the device."""
        seen = self._penalties.seen(self._rows) if self._fixed.penalties is not None else ()
        masks = self._of_masks
        more = self._masks.for_now(masks, positions) if masks is not None else []
        banned = self._joined(masks.bad, *more) if masks is not None and more else ()
        where, *rest = upload([positions, *seen, *banned], self._device)
        changes = self._fixed
        if seen:
            changes = replace(changes, seen=(rest[0], rest[1], rest[2]))
        if banned:
            changes = replace(changes, banned=(rest[-2], rest[-1]))
        return changes, where

    def _joined(self, *lists: Listed) -> tuple[_Ints, npt.NDArray[np.int32]]:
        """Where each row begins, [num_rows + 1], and the ids."""
        of = np.concatenate([one.of for one in lists])
        order = np.argsort(of, kind="stable")
        starts = np.searchsorted(of[order], np.arange(len(self._rows) + 1))
        return starts, np.concatenate([one.ids for one in lists])[order].astype(np.int32)

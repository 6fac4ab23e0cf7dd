"""Rotary angles from a table: a model's rotary embedding is asked once for every position, at load, and looked up from then on.

Twelve small operations of every step become two. The tables are what the model's own module says, so they hold for every kind
of scaling that is fixed at load (`arch_rope.py` fixes those that transformers would recompute).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # the name everybody knows
from torch import nn

__all__ = ["AngleTable", "tabulate_angles"]

_MOST_BYTES: Final = 16 * 2**20
"""Of a model's tables: they would cost more time at the start than they save in many steps."""
_PIECE: Final = 4096
_ROUND: Final = 256
"""The runner's tables hold whole blocks, which may reach beyond the longest request."""


class AngleTable:
    """Takes the place of a rotary embedding's forward pass: (x, positions) -> (cos, sin), [..., head_dim] in the dtype of x."""

    def __init__(self, plain: Callable[..., Any], cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Take over tables [num_positions, head_dim]."""
        self._plain, self.cos, self.sin = plain, cos, sin

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Look up; another dtype is computed as before."""
        if x.dtype is not self.cos.dtype:
            return self._plain(x, position_ids)
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)


def tabulate_angles(module: nn.Module, length: int, dtype: torch.dtype) -> int:
    """Give every rotary embedding below `module` a table, if it says one pair of angles for a position.

    Args:
        length: tokens of the longest request.
        dtype: of the model's hidden states.

    Returns:
        How many there are.
    """
    left, count = _MOST_BYTES, 0
    for rope in module.modules():
        if not isinstance(getattr(rope, "rope_type", None), str) or list(rope.children()):
            continue
        table = _table(rope, -(-length // _ROUND) * _ROUND, dtype, left)
        if table is not None:
            rope.forward = table  # its attributes stay for whoever reads them
            left -= table.cos.nbytes + table.sin.nbytes
            count += 1
    return count


@torch.inference_mode()
def _table(rope: Any, length: int, dtype: torch.dtype, left: int) -> AngleTable | None:
    """None if it is too large, or the module wants or gives something else."""
    buffer = next(rope.buffers(), None)
    if buffer is None:
        return None
    like = torch.empty((1, 1, 1), dtype=dtype, device=buffer.device)
    try:
        one = rope(like, torch.zeros((1, 1), dtype=torch.long, device=buffer.device))
        if not _are_angles(one, 1, dtype) or 2 * length * one[0].nbytes > left:
            return None
        # In pieces: what is computed on the way is many times the size of the table.
        pieces = [rope(like, part[None]) for part in torch.split(torch.arange(length, device=buffer.device), _PIECE)]
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    cos, sin = (torch.cat([piece[index][0] for piece in pieces]) for index in range(2))
    return AngleTable(rope.forward, cos, sin)


def _are_angles(found: Any, length: int, dtype: torch.dtype) -> bool:
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(isinstance(part, torch.Tensor) and part.dtype is dtype and part.dim() == 3 for part in found)
        and all(part.shape[:2] == (1, length) for part in found)
    )

"""Counter-based randomness: one uniform number per (seed, branch, position), the same on every device and in any batch.

Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC '11); no state, so nothing has to be saved
for a preempted, resumed or forked request.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["philox_4x32", "uniform"]

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds over int64 tensors that hold 32-bit words; all of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps to 64 bits with the right bit pattern; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & _MASK, p0 & _MASK
        high1, low1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: torch.Tensor, branch: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One number in (0, 1) per element.

    Args:
        seed: [n] int64, 0 <= seed < 2**63; the key.
        branch: [n] int64, index of the parallel sample.
        position: [n] int64, index of the sampled token in its sequence.

    Returns:
        [n] float64, multiples of 2**-32 plus 2**-33: never 0 and never 1.
    """
    zero = torch.zeros_like(seed)
    word, _, _, _ = philox_4x32(
        (position & _MASK, (position >> 32) & _MASK, branch & _MASK, zero), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return (word.double() + 0.5) * 2.0**-32

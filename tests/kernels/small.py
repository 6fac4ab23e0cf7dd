"""What the tests of the small kernels share: random tensors, and torch as the measure."""

from __future__ import annotations

import math

import torch

from streamkv_kernels.emulated import EmulatedDevice, Schedule

NAN = float("nan")
SCHEDULES = (Schedule(), Schedule("newest"), Schedule("random", seed=1))


def random(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def as_exact_as_torch(ours: torch.Tensor, by_torch: torch.Tensor, exact: torch.Tensor) -> None:
    """The largest error, measured in the largest number of its row, is at most twice torch's."""
    scale = exact.abs().amax(dim=-1, keepdim=True)
    error, allowed = (float(((one.double() - exact).abs() / scale).max()) for one in (ours, by_torch))
    assert error <= 2 * allowed, f"error {error:.2e}, torch's {allowed:.2e}"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def spaced(x: torch.Tensor, gap: int = 8) -> torch.Tensor:
    """The same numbers with NaN between rows of the last dimension, and before the first: an error of a stride shows."""
    wide = x.shape[-1] + gap
    memory = torch.full((math.prod(x.shape[:-1]) + 1, wide), NAN, dtype=x.dtype)
    view = memory[1:].view(*x.shape[:-1], wide)[..., : x.shape[-1]]
    view.copy_(x)
    return view


def in_every_schedule(device: EmulatedDevice) -> list[EmulatedDevice]:
    """The same libraries, threads in other orders."""
    return [
        EmulatedDevice(device.checked, schedule, device.sources, device.cache, optimize=device.optimize) for schedule in SCHEDULES
    ]

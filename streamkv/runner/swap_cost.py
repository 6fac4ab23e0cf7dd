"""Whether it pays to move a preempted request's blocks to the host, and how much memory they may have there."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import torch

from streamkv.runner.host_blocks import HostBlocks
from streamkv.runner.memory import free_memory
from streamkv.runner.model_runner import ModelRunner

__all__ = ["default_swap_memory", "swap_cost"]

_MOST: Final = 4 << 30
_MOVED: Final = 16
"""Blocks that are moved out and in to see how long one takes."""


def default_swap_memory(device: torch.device, pool_bytes: int) -> int:
    """Bytes for slots if nobody says how many: none beside a pool on the CPU, which had better be larger itself.

    Beside a GPU as much as the pool, but no more than 4 GiB and a quarter of what the host has free.
    """
    if device.type != "cuda":
        return 0
    return min(pool_bytes, _MOST, free_memory(torch.device("cpu")) // 4)


def swap_cost(runner: ModelRunner, host: HostBlocks, device: torch.device, num_tokens: int) -> float:
    """Prompt tokens that are computed in the time in which a block is moved out and back in; both are measured.

    Done before the first request: it writes the first blocks of the pool.

    Args:
        num_tokens: of the prompt that is computed: as many as a step may have.
    """
    num_blocks = min(_MOVED, host.num_slots, runner.pool.spec.num_blocks)
    pairs = [(index, index) for index in range(num_blocks)]
    moved, computed = [], []
    for _ in range(2):  # the first time of anything takes longer
        start = _now(device)
        host.swap_out(pairs)
        host.swap_in(pairs)
        middle = _now(device)
        runner.warm_up(num_tokens)
        moved.append(middle - start)
        computed.append(_now(device) - middle)
    return min(moved) / num_blocks / (min(computed) / num_tokens)


def _now(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()

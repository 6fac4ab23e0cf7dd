"""How many KV blocks fit."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import Final

import structlog
import torch

from streamkv.attention import AttentionBackend, KVSpec, LayerSpec, Recorder
from streamkv.errors import ConfigError
from streamkv.runner.loader import LoadedModel
from streamkv.runner.model_runner import ModelRunner

__all__ = ["free_memory", "measure_step", "num_blocks_for", "pool_blocks"]

_CGROUP: Final = Path("/sys/fs/cgroup")
_LIMITS: Final = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Folder and files of the two versions of control groups; without a limit the first says `max`, the second a huge number."""
_PROCESS: Final = Path("/proc/self")
_FRACTIONS: Final = {"cuda": 0.9}
_FRACTION: Final = 0.5
"""Shares of the free memory that a pool gets if nobody says: a GPU's is there for it, a computer's for other programs too."""
_PER_RECORDING: Final = 32 << 20
"""Bytes for each size of steps that is recorded: what the driver keeps for a CUDA graph, and its part of the memory that all of
them share. A guess on the safe side until it has been measured on a GPU; only recordings made ahead count."""

log = structlog.get_logger(__name__)


def num_blocks_for(
    model: LoadedModel,
    backend: AttentionBackend,
    *,
    block_size: int,
    num_blocks: int | None,
    kv_cache_memory: int | None,
    memory_fraction: float | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
) -> int:
    """The asked number of blocks, or what the asked bytes hold, or a fraction of what a worst-case step leaves free.

    Raises:
        ConfigError: the memory does not hold even one request of full length.
    """
    bytes_per_block = KVSpec(1, block_size, model.dtype, model.layers).bytes_per_block
    longest = -(-max_model_len // block_size)
    if num_blocks is not None:
        return num_blocks
    if kv_cache_memory is not None:
        count = kv_cache_memory // bytes_per_block
        if count < 1:
            raise ConfigError(
                f"kv_cache_memory of {kv_cache_memory} bytes holds no block of {bytes_per_block} bytes; give more",
                param="kv_cache_memory",
            )
        return count
    num_tokens = min(max_num_batched_tokens, max_model_len)
    peak = measure_step(model, backend, block_size=block_size, num_tokens=num_tokens, num_seqs=max_num_seqs)
    # Weights that lie in their files are page cache, and so counted as free, but are not to be given away.
    free = free_memory(model.device) - model.mapped_bytes
    reserve = _PER_RECORDING * len(backend.recorded_ahead) if isinstance(backend, Recorder) else 0
    # More than all rows at full length would serve as prefix cache only; who wants that says how much.
    fraction = _FRACTIONS.get(model.device.type, _FRACTION) if memory_fraction is None else memory_fraction
    count = min(
        pool_blocks(free=free, peak=peak, reserve=reserve, fraction=fraction, bytes_per_block=bytes_per_block),
        max_num_seqs * longest,
    )
    if count < longest:
        raise ConfigError(
            f"the free memory holds {max(count, 0)} KV blocks and one request of {max_model_len} tokens needs {longest}; "
            "lower max_model_len or raise memory_fraction",
            param="max_model_len",
        )
    log.info(
        "kv_pool_sized",
        free_bytes=free,
        step_bytes=peak,
        reserved_bytes=reserve,
        num_blocks=count,
        bytes=count * bytes_per_block,
    )
    return count


def pool_blocks(*, free: int, peak: int, reserve: int, fraction: float, bytes_per_block: int) -> int:
    """Blocks in a share of what is left; at least 0.

    Args:
        free: bytes, with the weights loaded and no pool.
        peak: bytes that the worst step takes and gives back.
        reserve: bytes that will be taken later and kept.
        fraction: share of the rest that the pool may have, 0 to 1.
    """
    return max(0, int((free - peak - reserve) * fraction)) // bytes_per_block


def measure_step(model: LoadedModel, backend: AttentionBackend, *, block_size: int, num_tokens: int, num_seqs: int) -> int:
    """Bytes that the worst step needs beside weights and pool, measured by running it on a pool just large enough.

    What it took is given back before it returns, to the device too, so that what is free then is what a pool may have.
    """
    layers: tuple[LayerSpec, ...] = model.layers
    pool = backend.allocate_kv(KVSpec(-(-num_tokens // block_size), block_size, model.dtype, layers))
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device) if on_gpu else _restart_peak()
    runner = ModelRunner(model, backend, pool, max_num_seqs=num_seqs, max_model_len=num_tokens)
    runner.warm_up(num_tokens)
    runner.warm_up_rows(num_tokens)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else _peak()
    del runner, pool
    backend.allocate_kv(KVSpec(1, block_size, model.dtype, layers))  # it keeps the latest one
    gc.collect()  # a runner and what it recorded hold each other
    if on_gpu:
        torch.cuda.empty_cache()
    return max(0, peak - before)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; on the CPU bounded by the control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo("MemAvailable")
    for folder, most, now in _LIMITS:
        limit = _number(_CGROUP / folder / most)
        if limit is not None:
            # As in MemAvailable, page cache counts as free: reading the weights has filled the group's limit with it.
            used = (_number(_CGROUP / folder / now) or 0) - _page_cache(_CGROUP / folder)
            available = min(available, limit - max(used, 0))
    return available


def _page_cache(group: Path) -> int:
    """Bytes of the control group that can be dropped at once."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counters = dict(line.split() for line in lines if line.count(" ") == 1)
    return int(counters.get("active_file", 0)) + int(counters.get("inactive_file", 0))


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("this system does not tell its free memory; give num_blocks or kv_cache_memory", param="num_blocks")


def _restart_peak() -> int:
    """Forget the process's peak so far, that of loading among them; returns the resident bytes.

    Where the kernel does not let us (man proc_pid_clear_refs), what is measured is an upper bound.
    """
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        log.info("peak_not_restarted", reason=str(error))
    return int((_PROCESS / "statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _peak() -> int:
    """Most bytes that were resident at once since `_restart_peak`."""
    for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

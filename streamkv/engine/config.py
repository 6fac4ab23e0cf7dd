"""What an engine is built from. Frozen, made once at the edge; every derived number is made in `streamkv.engine.build`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamkv.errors import ConfigError
from streamkv.hub import is_hub_id, resolve_model

__all__ = ["EngineConfig", "parse_bytes"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; the names are those of the command line.

    Attributes:
        model: folder in Hugging Face's layout, or a hub id `org/name`; None = the model in the box.
        revision: branch, tag or commit of a hub id; None = the hub's default branch.
        served_model_name: what clients call it; None = the folder's name, or the hub id.
        backend: `auto`, `torch`, `cuda`, the name of an entry point, or `package.module:Class`.
        device: torch device; `auto` = what the backend wants.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantization: of linear layers: `int8` (a scale for each output channel), `int4` (for each 32 inputs of one), or None.
        load_format: `safetensors`, or `dummy` for random weights.
        block_size: tokens per KV block.
        num_blocks: size of the pool; None = from `kv_cache_memory`.
        kv_cache_memory: bytes for the pool; None = from `memory_fraction`.
        memory_fraction: share of the memory that is free after a worst-case step; None = 0.9 on a GPU, else 0.5.
        swap_memory: bytes on the host for the blocks of preempted requests; 0 = what they held is computed again; None = none
            beside a pool on the CPU, beside one on a GPU as much as the pool, at most 4 GiB and a quarter of what is free.
        swap_block_tokens: prompt tokens that are computed in the time in which a block is moved to the host and back: what was
            preempted is moved or computed, whichever is cheaper by it; None = measured at start.
        max_model_len: most tokens of a request; None = what the model was made for.
        max_num_seqs: most requests in a step.
        max_num_batched_tokens: token budget of a step.
        max_queued_requests, max_queued_tokens: bounds of the waiting queue.
        enable_prefix_caching: share blocks between requests with equal prefixes.
        scheduling_policy: `fcfs`, or `priority` (lower first).
        speculation: `off`, or `ngram`: drafts looked up in a request's own tokens are checked, several in one step. The tokens
            are the same; requests with penalties, masks, processors or log-probabilities get none.
        seed: of `dummy` weights.
        logits_processors: names of logits processors that requests may ask for, or `package.module:Class`.
        look_ahead: plan the next step while one runs.
        poison: debug: fill new blocks with NaN.
    """

    model: str | None = None
    revision: str | None = None
    served_model_name: str | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantization: Literal["int8", "int4"] | None = None
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    memory_fraction: float | None = None
    swap_memory: int | None = None
    swap_block_tokens: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    speculation: Literal["off", "ngram"] = "off"
    seed: int = 0
    logits_processors: tuple[str, ...] = ()
    look_ahead: bool = True
    poison: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_queued_requests", "max_queued_tokens"):
            _at_least_one(name, getattr(self, name))
        for name in ("num_blocks", "kv_cache_memory", "max_model_len"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.num_blocks is not None and self.kv_cache_memory is not None:
            raise ConfigError("give num_blocks or kv_cache_memory, not both", param="num_blocks")
        if self.revision is not None and self.model is None:
            raise ConfigError("revision needs a model of the hub", param="revision")
        if self.quantization not in (None, "int8", "int4"):
            raise ConfigError("quantization must be int8 or int4, or not be given", param="quantization")
        if self.speculation not in ("off", "ngram"):
            raise ConfigError("speculation must be off or ngram", param="speculation")
        if self.swap_memory is not None and self.swap_memory < 0:
            raise ConfigError("swap_memory must be at least 0", param="swap_memory")
        if self.swap_block_tokens is not None and not self.swap_block_tokens >= 0:
            raise ConfigError("swap_block_tokens must be at least 0", param="swap_block_tokens")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 0.95:
            raise ConfigError("memory_fraction must be more than 0 and at most 0.95", param="memory_fraction")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError("max_num_batched_tokens must be at least max_num_seqs", param="max_num_batched_tokens")

    @property
    def model_path(self) -> Path:
        """Folder to load. The first time, a hub id may have to be downloaded.

        Raises:
            ModelLoadError: there is no such folder, or the hub does not give it.
        """
        if self.model is not None:
            return resolve_model(self.model, self.revision)
        from streamkv.demo import model_path  # only who asks for the model in the box needs it

        return model_path()

    @property
    def model_name(self) -> str:
        """What clients may write into `model`."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return "streamkv-demo"
        return self.model if is_hub_id(self.model) else Path(self.model).name


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1", param=name)


def parse_bytes(text: str) -> int:
    """`512MiB`, `2GiB`, `1.5GB`, `1000000` as a number of bytes.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write for example 512MiB or 2GiB")
    unit = (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))

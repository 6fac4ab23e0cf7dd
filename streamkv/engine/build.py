"""From a configuration to a running engine: load the model, choose the backend, size and allocate the pool, start the task."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog
import torch

from streamkv.attention import AttentionBackend, KVSpec
from streamkv.backend_registry import backend_for, load_backend
from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.scheduler import Scheduler
from streamkv.engine.api import EngineInfo
from streamkv.engine.config import EngineConfig
from streamkv.engine.engine import InProcessEngine
from streamkv.engine.thread import RunnerThread
from streamkv.errors import ConfigError
from streamkv.runner.host_blocks import HostBlocks
from streamkv.runner.loader import LoadedModel, load_model
from streamkv.runner.logits_processor import LogitsProcessor, ProcessorSetup, load_processors
from streamkv.runner.memory import num_blocks_for
from streamkv.runner.model_runner import ModelRunner
from streamkv.runner.prompt_reader import HiddenTap
from streamkv.runner.swap_cost import default_swap_memory, swap_cost

__all__ = ["build_engine"]

_DRAFT_ROWS: Final = 32
"""Tokens up to which a pass takes little longer than for one: the weights are read once either way (docs/benchmarks.md)."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    model: LoadedModel
    runner: ModelRunner
    num_blocks: int
    num_host_slots: int
    swap_block_tokens: float
    max_model_len: int
    backend: str
    embedding_dim: int
    processors: dict[str, LogitsProcessor]


@asynccontextmanager
async def build_engine(config: EngineConfig, *, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[InProcessEngine]:
    """A started engine; closed when the block is left.

    Raises:
        ConfigError: a setting, the model folder or the backend is at fault; one sentence says which.
    """
    thread = RunnerThread()
    started = time.monotonic()
    try:
        parts = await thread.submit(_load, config, thread.deliver)
    except BaseException:
        thread.close()
        raise
    cache = KVCache(
        parts.num_blocks,
        config.block_size,
        fingerprint=parts.model.fingerprint,
        enable_prefix_caching=config.enable_prefix_caching,
        num_host_slots=parts.num_host_slots,
        swap_block_tokens=parts.swap_block_tokens,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=parts.max_model_len,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            policy=config.scheduling_policy,
            draft_rows=min(_DRAFT_ROWS, config.max_num_batched_tokens) if config.speculation == "ngram" else 0,
        ),
        cache,
    )
    info = EngineInfo(
        model=config.model_name,
        max_model_len=parts.max_model_len,
        vocab_size=parts.model.vocab_size,
        eos_token_ids=parts.model.eos_token_ids,
        block_size=config.block_size,
        num_blocks=parts.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        backend=parts.backend,
        dtype=str(parts.model.dtype).removeprefix("torch."),
        epoch=secrets.token_hex(8),
        embedding_dim=parts.embedding_dim,
        logits_processors=tuple(parts.processors),
        fingerprint=parts.model.fingerprint,
    )
    engine = InProcessEngine(
        scheduler,
        parts.runner,
        thread,
        info,
        look_ahead=config.look_ahead,
        clock=clock,
        check=config.poison,
        check_arguments={name: processor.check for name, processor in parts.processors.items()},
    )
    engine.start()
    log.info("engine_ready", seconds=round(time.monotonic() - started, 2), num_blocks=info.num_blocks, dtype=info.dtype)
    try:
        yield engine
    finally:
        await engine.close()


def _torch_device(name: str, backend: AttentionBackend) -> str:
    """Where the model's tensors are; `auto` and names that only the backend knows leave it to that."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return backend.limits.device
    if device.type != backend.limits.device:
        raise ConfigError(
            f"backend {backend.name!r} runs on {backend.limits.device}, not on {name}; leave device at auto", param="device"
        )
    return name


def _load(config: EngineConfig, on_pass: Callable[[], None]) -> _Parts:
    """Everything that touches torch; runs in the runner's thread."""
    backend, reason = load_backend(config.backend, config.device)
    log.info("backend_chosen", backend=backend.name, reason=reason)
    device = _torch_device(config.device, backend)
    model = load_model(
        config.model_path,
        device=device,
        dtype=config.dtype,
        load_format=config.load_format,
        max_model_len=config.max_model_len,
        seed=config.seed,
        ops=backend.ops,
        quantization=config.quantization,
    )
    max_model_len = config.max_model_len or model.max_model_len
    if max_model_len > model.max_model_len:
        raise ConfigError(f"max_model_len {max_model_len} is more than the model's {model.max_model_len}", param="max_model_len")
    backend, reason_of_change = backend_for(config.backend, backend, KVSpec(1, config.block_size, model.dtype, model.layers))
    if reason_of_change is not None:
        log.info("backend_chosen", backend=backend.name, reason=reason_of_change)
    num_blocks = num_blocks_for(
        model,
        backend,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_cache_memory=config.kv_cache_memory,
        memory_fraction=config.memory_fraction,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    pool = backend.allocate_kv(KVSpec(num_blocks, config.block_size, model.dtype, model.layers))
    swap_memory = config.swap_memory
    if swap_memory is None:
        swap_memory = default_swap_memory(model.device, num_blocks * pool.spec.bytes_per_block)
    host = HostBlocks(pool, swap_memory, pinned=model.device.type == "cuda")
    setup = ProcessorSetup(config.max_num_seqs, model.vocab_size, model.device, config.model_path)
    processors = load_processors(config.logits_processors, setup)
    tap = HiddenTap(model.module)
    if not tap.width:
        log.info("no_embeddings", reason="the model's hidden states do not come by before its vocabulary projection")
    runner = ModelRunner(
        model,
        backend,
        pool,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        processors=processors,
        tap=tap if tap.width else None,
        host=host,
        poison=config.poison,
        on_pass=on_pass,
    )
    block_tokens = config.swap_block_tokens
    if block_tokens is None:
        longest = min(config.max_num_batched_tokens, max_model_len, num_blocks * config.block_size)
        block_tokens = swap_cost(runner, host, model.device, longest) if host.num_slots else 0.0
    if host.num_slots:
        log.info("swap", num_host_slots=host.num_slots, bytes=swap_memory, block_tokens=round(block_tokens, 3))
    return _Parts(model, runner, num_blocks, host.num_slots, block_tokens, max_model_len, backend.name, tap.width, processors)

"""OpenVINO GenAI's continuous batching with its prefix cache. Weights, activations and KV cache in the model's own precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.workloads import Job

_PRECISION = {"bfloat16": "bf16", "float32": "f32"}


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `converted`, a folder made by `benchmarks.compare.convert`; `dtype`, `threads`, `kv_tokens`."""
    precision = _PRECISION[options["dtype"]]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": options["threads"],
    }
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.num_kv_blocks = options["kv_tokens"] // 32  # tokens of a block on processors
    scheduler.max_num_seqs = 256
    scheduler.max_num_batched_tokens = 512
    pipeline = genai.ContinuousBatchingPipeline(options["converted"], scheduler, "CPU", properties)
    names = iter(range(1 << 60))

    def serve(batch: Sequence[Job]) -> Served:
        outputs: list[list[int]] = [[] for _ in batch]
        times: list[list[float]] = [[] for _ in batch]
        began = perf_counter()
        handles = [pipeline.add_request(next(names), _tensor(job.prompt), _greedy(job.max_tokens)) for job in batch]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = perf_counter() - began
            for handle, tokens, stamps in zip(handles, outputs, times, strict=True):
                while handle.can_read():
                    for part in handle.read().values():
                        tokens.extend(part.generated_ids)
                        stamps.extend([now] * len(part.generated_ids))
        return Served(perf_counter() - began, outputs, times)

    yield of_jobs(serve, runtime=openvino.get_version(), properties=str(properties))


def _tensor(prompt: list[int]) -> Any:
    return openvino.Tensor(np.array([prompt], dtype=np.int64))


def _greedy(max_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.do_sample = False
    config.ignore_eos = True
    config.set_eos_token_id(0)  # without one it looks for a tokenizer's; it is ignored
    return config

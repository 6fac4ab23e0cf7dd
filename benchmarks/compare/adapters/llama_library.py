"""llama.cpp through llama-cpp-python's functions: what llama-bench and llama-batched-bench do, with given tokens, greedily.

All prompts are computed first, then all sequences decode together, one `llama_decode` a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import llama_cpp as llama
import numpy as np

from benchmarks.compare.adapters import Opened, Served, of_jobs
from benchmarks.workloads import Job

_BATCH, _MICRO_BATCH = 2048, 512  # as the tools of llama.cpp have it
_BF16, _F32, _F16 = 30, 0, 1  # ggml_type
_CACHE = {"bfloat16": _F16, "float32": _F32}  # its kernels for attention want float16, the default


@contextmanager
def opened(options: dict[str, Any]) -> Iterator[Opened]:
    """Options: `converted`, a GGUF file; `dtype` of the KV cache, `threads`."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(options["converted"].encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {options['converted']}")
    context = _Context(model, options)

    def serve(batch: Sequence[Job]) -> Served:
        context.make_room(batch)
        return context.serve(batch)

    yield of_jobs(serve, system=llama.llama_print_system_info().decode().replace(" |", ","))


class _Context:
    """A context with room for the requests of the latest workload."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self._shape = (0, 0)
        self._context: Any = None

    def make_room(self, batch: Sequence[Job]) -> None:
        """Not part of what is timed; the tools have their context before they begin, too."""
        shape = (len(batch), max(len(job.prompt) + job.max_tokens for job in batch))
        if shape == self._shape:
            llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_seq_max = shape[0]
        params.n_ctx = shape[0] * (-(-shape[1] // 256) * 256)
        params.n_batch = _BATCH
        params.n_ubatch = _MICRO_BATCH
        params.n_threads = params.n_threads_batch = self._options["threads"]
        params.type_k = params.type_v = _CACHE[self._options["dtype"]]
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {shape[0]} sequences of {shape[1]} tokens")
        self._shape = shape

    def serve(self, batch: Sequence[Job]) -> Served:
        """Greedy answers; all sequences must want the same number of tokens."""
        steps = batch[0].max_tokens
        assert all(job.max_tokens == steps for job in batch), "sequences decode in lock step"
        began = perf_counter()
        tokens = [self._prefill(row, job.prompt) for row, job in enumerate(batch)]
        outputs, times = [[token] for token in tokens], [perf_counter() - began]
        for step in range(1, steps):
            tokens = self._decode([(row, len(job.prompt) + step - 1, tokens[row]) for row, job in enumerate(batch)])
            times.append(perf_counter() - began)
            for row, token in enumerate(tokens):
                outputs[row].append(token)
        return Served(perf_counter() - began, outputs, [times] * len(batch))

    def _prefill(self, row: int, prompt: list[int]) -> int:
        for first in range(0, len(prompt), _BATCH):
            part = prompt[first : first + _BATCH]
            self._fill([(row, first + index, token) for index, token in enumerate(part)], last_only=True)
        return self._argmax(-1)

    def _decode(self, entries: list[tuple[int, int, int]]) -> list[int]:
        self._fill(entries, last_only=False)
        return [self._argmax(index) for index in range(len(entries))]

    def _fill(self, entries: list[tuple[int, int, int]], *, last_only: bool) -> None:
        """Compute (sequence, position, token) each."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (row, position, token) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = not last_only or index == len(entries) - 1
        status = llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _argmax(self, index: int) -> int:
        row = llama.llama_get_logits_ith(self._context, index)
        logits = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
        return int(logits.argmax())

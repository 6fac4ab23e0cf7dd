"""Where the time of a step goes: decode steps of 1, 8 and 32 streams and a prompt of 512 tokens, by kind of work.

python -m benchmarks.step [--backend cpu] [--context 300] [--unlike 24] [--operations] [--rounds 9] [--threads 2] [--quick]

The model is that of `benchmarks.workloads` (254M parameters, bfloat16, random weights). `--unlike` streams have contexts of 20
to 760 tokens, as in *mixed32*. Kinds of work are measured inside recorded steps of the cpu backend; other steps are shown as a
whole, or with `--operations` by operation of torch. The limit is the weights and the KV that a step has to read, divided by the
read bandwidth that is measured in the same run with as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.attention import KVSpec
from streamkv.backend_registry import load_backend
from streamkv.core.step import Step
from streamkv.logs import configure_logs
from streamkv.runner.loader import LoadedModel, load_model
from streamkv.runner.model_runner import ModelRunner
from streamkv.runner.params import RowParams
from streamkv.sampling_params import Sampling
from streamkv_backends.cpu.tape import KINDS

BLOCK_SIZE = 16
PROFILED = 3
"""Steps that the profiler watches."""
COLUMNS = ["step", "ms", "linear", "attention", "norms, activations, adds", "sampling", "rest", "limit", "of the limit"]


@dataclass(frozen=True)
class Case:
    """A step: sequences with `contexts` tokens, of which the last `new` are computed in it."""

    name: str
    contexts: list[int]
    new: int = 1

    def step(self, index: int, random: np.random.Generator, vocab_size: int) -> Step:
        """Ready to run; the first one hands out blocks."""
        step, block = Step(index, 0.0), 0
        for row, context in enumerate(self.contexts):
            step.rows.append(row)
            step.starts.append(context - self.new)
            step.counts.append(self.new)
            step.samples.append(1)
            step.tokens.extend(random.integers(3, vocab_size - 1, self.new).tolist())
            blocks = range(block, block + -(-context // BLOCK_SIZE))
            if index == 0:
                step.admitted.append((row, str(row)))
                step.tables.append((row, 0, tuple(blocks)))
            block = blocks.stop
        return step


def main() -> None:
    arguments = _arguments()
    configure_logs(level="warning")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_setting("streamkv", "torch", "transformers")
    bandwidth = _read_bandwidth(64 if arguments.quick else 512)
    print(f"threads {torch.get_num_threads()}, read bandwidth {bandwidth / 1e9:.1f} GB/s\n", flush=True)
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    backend, _ = load_backend(arguments.backend)
    model = load_model(folder, dtype="bfloat16", ops=backend.ops)
    rows = [_measure(model, backend, case, arguments, bandwidth) for case in _cases(arguments)]
    print_table(f"milliseconds of a step by kind of work, backend {backend.name}", COLUMNS, rows)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    context, unlike = arguments.context, Random(0)
    return [
        *(Case(f"decode, {streams} x {context}", [context] * streams) for streams in arguments.streams),
        *(Case(f"decode, {streams} unlike", [unlike.randint(20, 760) for _ in range(streams)]) for streams in arguments.unlike),
        Case("prompt of 512", [512], 512),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="where the time of a step goes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--unlike", type=int, nargs="*", default=[], help="streams with contexts of 20 to 760 tokens")
    parser.add_argument("--operations", action="store_true", help="the longest operations of torch in each step, by its profiler")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's choice")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    return parser.parse_args()


def _read_bandwidth(mebibytes: int) -> float:
    """Bytes a second of a sum over memory that no cache holds."""
    data = torch.ones(mebibytes << 17, dtype=torch.int64)
    seconds = []
    for _ in range(7):
        began = perf_counter()
        data.sum()
        seconds.append(perf_counter() - began)
    return data.nbytes / min(seconds)


class _Timed(ModelRunner):
    """Tells how long a step sampled."""

    sampling = 0.0

    def _choose(self, *args: Any) -> Any:
        began = perf_counter()
        chosen = super()._choose(*args)
        self.sampling = perf_counter() - began
        return chosen


def _measure(model: LoadedModel, backend: Any, case: Case, arguments: argparse.Namespace, bandwidth: float) -> list[str]:
    """One row of the table."""
    num_seqs, longest = len(case.contexts), max(case.contexts)
    blocks = sum(-(-context // BLOCK_SIZE) for context in case.contexts)
    pool = backend.allocate_kv(KVSpec(blocks, BLOCK_SIZE, model.dtype, model.layers))
    runner = _Timed(model, backend, pool, max_num_seqs=num_seqs, max_model_len=max(longest, 512))
    params = {row: RowParams(Sampling(max_tokens=longest, temperature=0.0), 0, [1], 1) for row in range(num_seqs)}
    random = np.random.default_rng(num_seqs)
    totals, parts = [], []
    for index in range(arguments.rounds + 4):
        step = case.step(index, random, model.vocab_size)
        seconds = _watch(runner)
        began = perf_counter()
        runner.run(step, params)
        if index >= 4:  # recorded and proved by then
            totals.append(perf_counter() - began)
            parts.append((*_kinds(seconds), runner.sampling))
    total = median(totals)
    linear, attention, small, sampling = (median(part[index] for part in parts) for index in range(4))
    weights = model_bytes(model)
    limit = (weights + sum(case.contexts) * pool.spec.bytes_per_block / BLOCK_SIZE) / bandwidth
    known = linear + attention + small > 0
    cells = [_ms(linear), _ms(attention), _ms(small)] if known else ["", "", ""]
    rest = total - linear - attention - small - sampling if known else total - sampling
    bound = [_ms(limit), f"{total / limit:.2f} x"] if case.new == 1 else ["", ""]
    print(f"{case.name}: {_ms(total)} ms", flush=True)
    if arguments.operations:
        later = (case.step(arguments.rounds + 4 + index, random, model.vocab_size) for index in range(PROFILED))
        _operations(case.name, lambda: [runner.run(step, params) for step in later])
    return [case.name, _ms(total), *cells, _ms(sampling), _ms(rest), *bound]


def _operations(name: str, run: Callable[[], object]) -> None:
    """What torch's profiler says of some steps, without what its operations call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    longest = sorted(profile.key_averages(), key=lambda each: each.self_cpu_time_total, reverse=True)[:6]
    rows = [[each.key, f"{each.self_cpu_time_total / PROFILED / 1e3:.2f}", f"{each.count / PROFILED:.0f}"] for each in longest]
    print_table(f"{name}: longest operations of torch in a step", ["operation", "ms", "calls"], rows)


def model_bytes(model: LoadedModel) -> int:
    """Weights that every step reads: all but the embedding, of which it reads a few rows."""
    shape = model.module.config
    head = shape.hidden_size * model.vocab_size
    width = shape.hidden_size
    layer = model.layers[0]
    attention = width * layer.head_dim * (2 * layer.num_heads + 2 * layer.num_kv_heads)
    return int((len(model.layers) * (attention + 3 * width * shape.intermediate_size) + head) * model.dtype.itemsize)


def _watch(runner: ModelRunner) -> Any:
    """Have every recording add up its time in one array."""
    seconds = (ctypes.c_double * len(KINDS))()
    recordings = runner._recordings  # noqa: SLF001  # the benchmark looks inside
    if recordings is not None:
        for kept in recordings._kept.values():  # noqa: SLF001  # as above
            kept.recorded.seconds = seconds
    return seconds


def _kinds(seconds: Any) -> tuple[float, float, float]:
    linear, attention = seconds[KINDS["linear"]], seconds[KINDS["attend"]]
    return linear, attention, sum(seconds) - linear - attention


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    main()

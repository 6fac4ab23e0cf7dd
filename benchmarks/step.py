"""Where the time of a step goes: decode steps of 1, 8 and 32 streams and a prompt of 512 tokens, by kind of work.

python -m benchmarks.step [--backend cpu] [--context 300] [--rounds 9] [--threads 2] [--quick]

The model is that of `benchmarks.workloads` (254M parameters, bfloat16, random weights). Kinds of work are measured inside
recorded steps of the cpu backend; other steps are shown as a whole. The limit is the weights and the KV that a step has to read,
divided by the read bandwidth that is measured in the same run with as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
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
COLUMNS = ["step", "ms", "linear", "attention", "norms, activations, adds", "sampling", "rest", "limit", "of the limit"]


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
    cases = [(streams, arguments.context, 1) for streams in arguments.streams] + [(1, 512, 512)]
    rows = [_measure(model, backend, case, arguments.rounds, bandwidth) for case in cases]
    print_table(f"milliseconds of a step by kind of work, backend {backend.name}", COLUMNS, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="where the time of a step goes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=300)
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


def _measure(model: LoadedModel, backend: Any, case: tuple[int, int, int], rounds: int, bandwidth: float) -> list[str]:
    """One row of the table."""
    streams, context, new = case
    blocks = -(-context // BLOCK_SIZE)
    pool = backend.allocate_kv(KVSpec(streams * blocks, BLOCK_SIZE, model.dtype, model.layers))
    runner = _Timed(model, backend, pool, max_num_seqs=streams, max_model_len=max(context, 512))
    params = {row: RowParams(Sampling(max_tokens=context, temperature=0.0), 0, [1], 1) for row in range(streams)}
    random = np.random.default_rng(streams)
    totals, parts = [], []
    for index in range(rounds + 4):
        step = Step(index, 0.0)
        for row in range(streams):
            step.rows.append(row)
            step.starts.append(context - new)
            step.counts.append(new)
            step.samples.append(1)
            step.tokens.extend(random.integers(3, model.vocab_size - 1, new).tolist())
            if index == 0:
                step.admitted.append((row, str(row)))
                step.tables.append((row, 0, tuple(range(row * blocks, (row + 1) * blocks))))
        seconds = _watch(runner)
        began = perf_counter()
        runner.run(step, params)
        if index >= 4:  # recorded and proved by then
            totals.append(perf_counter() - began)
            parts.append((*_kinds(seconds), runner.sampling))
    total = median(totals)
    linear, attention, small, sampling = (median(part[index] for part in parts) for index in range(4))
    weights = model_bytes(model)
    limit = (weights + streams * context * pool.spec.bytes_per_block / BLOCK_SIZE) / bandwidth
    name = f"decode, {streams} x {context}" if new == 1 else f"prompt of {new}"
    known = linear + attention + small > 0
    cells = [_ms(linear), _ms(attention), _ms(small)] if known else ["", "", ""]
    rest = total - linear - attention - small - sampling if known else total - sampling
    bound = [_ms(limit), f"{total / limit:.2f} x"] if new == 1 else ["", ""]
    print(f"{name}: {_ms(total)} ms", flush=True)
    return [name, _ms(total), *cells, _ms(sampling), _ms(rest), *bound]


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

"""Linear layers: the cpu backend's own (bf16, int8, int4) beside oneDNN's prepacked one, at the shapes of a model's layers.

python -m benchmarks.linear [--rows 1 8 32 128 512] [--inputs 1024] [--outputs 5632] [--threads N] [--rounds 9] [--quick]

As many layers as fill `--mebibytes` are called one after the other, so that weights come from memory as they do in a step.
All kinds are timed in turns, and each round gives one ratio to oneDNN. "share" is that of the limit measured beside them: the
weight's bytes over the read bandwidth or the operations over the peak of oneDNN at 1024 rows, whichever takes longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.report import num_cores, print_setting, print_table
from streamkv.backend_registry import load_backend
from streamkv.fused import Quantization
from streamkv.runner.packed_linear import PackedLinear

KINDS: tuple[Quantization | None, ...] = (None, "int8", "int4")


def main() -> None:
    """Time every kind at every number of rows."""
    parser = argparse.ArgumentParser(description="linear layers of the cpu backend beside oneDNN's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 512])
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=5632)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--mebibytes", type=int, default=192, help="of bf16 weights; more than the last-level cache, or what a model has"
    )
    parser.add_argument("--quick", action="store_true", help="small layers, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.inputs, arguments.outputs, arguments.mebibytes, arguments.rounds = [1, 8], 256, 256, 1, 2
    torch.set_num_threads(arguments.threads)
    print_setting("streamkv", "torch")
    with torch.inference_mode():
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    inputs, outputs = arguments.inputs, arguments.outputs
    count = max(1, arguments.mebibytes * 2**20 // (2 * inputs * outputs))
    plain = [nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    layers: dict[str, list[Any]] = {"oneDNN": [PackedLinear(layer) for layer in plain]}
    ops: Any = load_backend("cpu")[0].ops
    for kind in KINDS:
        layers[kind or "bf16"] = [ops.linear(layer, kind) for layer in plain]
    of_weights = {
        name: count * (2 * inputs * outputs if name == "oneDNN" else some[0].num_bytes) for name, some in layers.items()
    }
    bandwidth, peak = _bandwidth(), _peak(layers["oneDNN"][0], inputs, outputs)
    limits = f"read {bandwidth / 1e9:.1f} GB/s, peak {peak / 1e9:.0f} GFLOP/s"
    print(f"{count} layers of {inputs} × {outputs}; {arguments.threads} threads; {limits}\n")
    table = []
    for rows in arguments.rows:
        x = torch.randn(rows, inputs, dtype=torch.bfloat16)
        seconds = _in_turns({name: _all(some, x) for name, some in layers.items()}, arguments.rounds)
        for name, times in seconds.items():
            took = median(times)
            ratio = median(one / own for one, own in zip(seconds["oneDNN"], times, strict=True))
            least = max(of_weights[name] / bandwidth, 2.0 * rows * inputs * outputs * count / peak)
            table.append([
                str(rows),
                name,
                f"{took / count * 1e6:.0f}",
                f"{of_weights[name] / took / 1e9:.1f}",
                f"{2e-9 * rows * inputs * outputs * count / took:.0f}",
                f"{least / took:.0%}",
                f"{ratio:.2f} ×",
            ])  # fmt: skip
    print_table("a layer", ["rows", "kind", "µs", "GB/s of weights", "GFLOP/s", "share of the limit", "speed, to oneDNN"], table)


def _all(layers: list[Any], x: torch.Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers][-1]


def _in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            began = perf_counter()
            run()
            if round_:
                seconds[name].append(perf_counter() - began)
    return seconds


def _bandwidth() -> float:
    """Bytes a second: the best of several readings of 1.5 GiB."""
    memory = torch.ones(3 * 2**26, dtype=torch.int64)
    return memory.nbytes / min(_in_turns({"read": memory.sum}, 5)["read"])


def _peak(layer: Any, inputs: int, outputs: int) -> float:
    x = torch.randn(1024, inputs, dtype=torch.bfloat16)
    return 2.0 * 1024 * inputs * outputs / min(_in_turns({"product": lambda: layer(x)}, 9)["product"])


if __name__ == "__main__":
    main()

"""What the processor path is meant to reach, each as a ratio of two measured figures of the same round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.compare.rounds import AGAIN, Measured

__all__ = ["AIMS", "LIMIT", "Aim", "ratio"]

LIMIT: Final = "limit"
WASTE_AIM: Final = 4.0


@dataclass(frozen=True)
class Aim:
    """`ours` is to be at least `target` times `theirs`, by one figure of one workload. `LIMIT` stands for the machine's."""

    what: str
    workload: str
    figure: str
    ours: str
    theirs: str
    target: float | None
    """At least so many times; for `LIMIT` the share of it, 1 / 1.3 for "within 1.3 times". None = only to be known."""


AIMS: Final = (
    Aim("*single*, decode rate, to llama.cpp's own", "single", "decode", "streamkv", "llama-cpp", 0.95),
    Aim("*single* to OpenVINO", "single", "rate", "streamkv", "openvino", 1.1),
    Aim("*single* to `generate`", "single", "rate", "streamkv", "generate", 2.5),
    Aim("*mixed32*, WebSocket server to OpenVINO in its process", "mixed32", "rate", "streamkv-ws", "openvino", 1.35),
    Aim("*mixed32*, WebSocket server to llama-server", "mixed32", "rate", "streamkv-ws", "llama-server", 3.0),
    Aim("*mixed32*, WebSocket server to `generate`", "mixed32", "rate", "streamkv-ws", "generate", 5.0),
    Aim("*prefix32* cold, to OpenVINO", "prefix32", "rate", "streamkv", "openvino", 8.0),
    Aim("*prefix32* repeated, to OpenVINO", AGAIN, "rate", "streamkv", "openvino", 1.0),
    Aim("prefill of 512, to llama.cpp", "prefill512", "prompt", "streamkv", "llama-cpp", 1.7),
    Aim("decode step of 8 streams, to llama.cpp", "decode8", "decode", "streamkv", "llama-cpp", 1.5),
    Aim("decode step of 32 streams, to llama.cpp", "decode32", "decode", "streamkv", "llama-cpp", 2.0),
    Aim("int8 *single* to our own bfloat16", "single", "rate", "streamkv-int8", "streamkv", 1.6),
    Aim("int8 *single*, decode rate, to llama.cpp Q8_0", "single", "decode", "streamkv-int8", "llama-cpp-q8", 1.0),
    Aim("int4 *single* to our own bfloat16", "single", "rate", "streamkv-int4", "streamkv", None),
    Aim("int4 *single*, decode rate, to llama.cpp Q4_K_M", "single", "decode", "streamkv-int4", "llama-cpp-q4", None),
    Aim("decode of 8 × 3,500, share of the limit", "long8", "decode", "streamkv", LIMIT, 1 / 1.3),
    Aim("*mixed32*, backend torch, to `generate`", "mixed32", "rate", "streamkv-torch", "generate", 3.0),
)


def ratio(measured: Mapping[str, Measured], workload: str, figure: str, ours: str, theirs: str) -> float | str:
    """Median over rounds of ours / theirs, each of the same round; or why there is none. The limit is that of our weights."""
    if workload not in measured:
        return f"{workload} was not run"
    own, found = measured[workload], []
    for name in (ours, theirs):
        rounds = own.limits_of.get(ours, own.limits) if name == LIMIT else own.rounds.get(name, [])
        values = [each[figure] for each in rounds if figure in each]
        if not values:
            return f"{name} failed" if name in own.failures else f"no figure of {name}"
        found.append(values)
    return median(a / b for a, b in zip(*found, strict=False))  # who is slow has fewer rounds

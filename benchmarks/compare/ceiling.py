"""The least time for a workload: the bytes that it must read over the read bandwidth, its operations over the peak of a product.

Prompts are computed first, each weight read once; then all streams that are not done take a token a step, which reads every
weight once and the cached keys and values of every stream, but a prefix that all of them share only once. Each of these takes the
longer of its two times. Only an engine that overlaps the two, prompts and decoding in one step, could do with less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workloads import Job

__all__ = ["Ceiling", "Machine", "ModelShape"]

_WIDTHS = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Machine:
    """Measured beside the engines.

    Attributes:
        bandwidth: bytes read a second.
        peak: operations a second.
    """

    bandwidth: float
    peak: float

    def seconds(self, nbytes: float, operations: float) -> float:
        """At least."""
        return max(nbytes / self.bandwidth, operations / self.peak)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama.

    Attributes:
        body: weights that every token meets.
        head: weights that every sampled token meets.
        width: bytes of a key or a value.
        weight_width: bytes of a weight; fewer than `width` where weights are quantised.
        kv_width: keys and values of one token, all layers.
        query_width: query numbers of one token, all layers.
    """

    body: int
    head: int
    width: int
    weight_width: float
    kv_width: int
    query_width: int

    @classmethod
    def of(cls, folder: Path, *, weight_bits: float | None = None) -> ModelShape:
        """From its config.json.

        Args:
            weight_bits: of a quantised weight, with its share of the scales. None = as the model has them.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layer = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
        width = _WIDTHS[config["dtype"]]
        weight_width = width if weight_bits is None else weight_bits / 8
        return cls(layers * layer, hidden * config["vocab_size"], width, weight_width, 2 * layers * keys, layers * queries)

    @property
    def weight_bytes(self) -> float:
        """What a pass over all weights reads."""
        return (self.body + self.head) * self.weight_width


@dataclass(frozen=True)
class Ceiling:
    """The limits of one model on one machine."""

    shape: ModelShape
    machine: Machine

    def prefill_s(self, jobs: Sequence[Job], *, cached: bool = False) -> float:
        """Seconds for all prompts and the first token of each.

        Args:
            cached: all but the last token of each prompt are in the prefix cache.
        """
        shape, shared = self.shape, _shared(jobs)
        operations = 2.0 * shape.head * len(jobs)
        parts = [(len(job.prompt) - 1 if cached else shared, len(job.prompt)) for job in jobs]
        if shared and not cached:
            parts.append((0, shared))
        for begin, end in parts:
            operations += 2.0 * shape.body * (end - begin)
            operations += 4.0 * shape.query_width * (end * (end + 1) - begin * (begin + 1)) / 2
        return self.machine.seconds(shape.weight_bytes, operations)

    def step_s(self, contexts: Sequence[int], *, shared: int = 0) -> float:
        """Seconds for one token of each stream; `contexts` are their tokens, of which all have the first `shared` in common."""
        shape = self.shape
        cached = shape.kv_width * (shared + sum(context - shared for context in contexts))
        operations = 2.0 * (shape.body + shape.head) * len(contexts) + 4.0 * shape.query_width * sum(contexts)
        return self.machine.seconds(shape.weight_bytes + cached * shape.width, operations)

    def decode_s(self, jobs: Sequence[Job]) -> float:
        """Seconds for all tokens after the first of each."""
        shared, seconds = _shared(jobs), 0.0
        for step in range(1, max(job.max_tokens for job in jobs)):
            contexts = [len(job.prompt) + step for job in jobs if job.max_tokens > step]
            seconds += self.step_s(contexts, shared=shared)
        return seconds

    def figures(self, jobs: Sequence[Job], *, cached: bool = False) -> dict[str, float]:
        """The figures of `benchmarks.compare.rounds.figures` that cannot be exceeded."""
        prefill, decode = self.prefill_s(jobs, cached=cached), self.decode_s(jobs)
        found = {"rate": sum(job.max_tokens for job in jobs) / (prefill + decode)}
        if len(jobs) == 1:
            found["prompt"] = len(jobs[0].prompt) / prefill
        if decode:
            found["decode"] = sum(job.max_tokens - 1 for job in jobs) / decode
        return found


def _shared(jobs: Sequence[Job]) -> int:
    """Tokens that all prompts begin with; 0 for a single one."""
    if len(jobs) == 1:
        return 0
    columns = zip(*(job.prompt for job in jobs), strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), 0)

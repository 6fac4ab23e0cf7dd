"""How the cost of a step grows: with streams, with context, with the model. Beside each point, what the machine allows.

python -m benchmarks.growth [--axes streams context model] [--repeats 3] [--backend auto] [--threads N] [--out FOLDER] [--quick]

Models are Llamas from 20M to 1B parameters with dummy weights, bfloat16. A point is a batch of requests with new token ids
through the engine; what counts is the time in which all streams decode. The limit of a point is measured right before it: see
benchmarks/compare/ceiling.py. Writes streams.svg, context.svg, model.svg and growth.json.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.compare.adapters import Served
from benchmarks.compare.apart import Apart, apart
from benchmarks.compare.ceiling import Ceiling, Machine, ModelShape
from benchmarks.compare.charts import curves
from benchmarks.compare.rounds import figures
from benchmarks.report import num_cores, print_setting, print_table, setting
from benchmarks.workloads import DEFAULT_MODEL_DIR, Job, make_config

VOCAB: Final = 32_000
BUDGET: Final = 512
STEPS: Final = 32
"""That all streams of a point decode together, at least."""
TIMEOUT_S: Final = 900.0

MODELS: Final[dict[str, dict[str, int]]] = {
    "20M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6},
    "80M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16},
    "254M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16},
    "500M": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20},
}
"""Heads of 64; a key-value head for 2 query heads, but 8 at most."""


@dataclass(frozen=True)
class Point:
    """One batch: so many streams, each with a prompt of `context` tokens, on one model."""

    model: str
    streams: int
    context: int

    def jobs(self, source: random.Random) -> list[Job]:
        """Outputs are longer than `STEPS`, because the first prompt is read before the last."""
        ahead = self.streams * self.context // BUDGET
        return [Job([source.randrange(3, VOCAB) for _ in range(self.context)], STEPS + 1 + ahead) for _ in range(self.streams)]

    @property
    def kv_tokens(self) -> int:
        """Room for two rounds."""
        return 2 * self.streams * (self.context + STEPS + 16 + self.streams * self.context // BUDGET)


AXES: Final[dict[str, tuple[str, list[Point]]]] = {
    "streams": ("streams, context 128", [Point("254M", 2**power, 128) for power in range(9)]),
    "context": ("tokens of context, 8 streams", [Point("254M", 8, 2**power) for power in range(7, 13)]),
    "model": ("parameters, 8 streams, context 300", [Point(model, 8, 300) for model in MODELS]),
}
QUICK: Final = {
    "streams": [Point("20M", 1, 32), Point("20M", 2, 32)],
    "context": [Point("20M", 1, 32), Point("20M", 1, 64)],
    "model": [Point("20M", 1, 32)],
}


@dataclass(frozen=True)
class Found:
    """A point's figures, one of each round.

    Attributes:
        x: where it stands on its axis.
        rates: tokens decoded a second.
        limits: the same, at most.
    """

    x: float
    point: Point
    rates: list[float]
    limits: list[float]

    def step_ms(self, rates: Sequence[float]) -> float:
        """Milliseconds of a step of all streams."""
        return 1000 * self.point.streams / median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="how the cost of a step grows", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where configurations of models are written")
    parser.add_argument("--out", type=Path, default=Path("build/growth"), help="folder for plots and figures")
    parser.add_argument("--quick", action="store_true", help="few small points, once: shows that it runs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines are ended on the way out
    print_setting("streamkv", "torch", "transformers")
    print(f"threads: {arguments.threads}\n")
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"setting": setting("streamkv", "torch"), "threads": arguments.threads}
    read = {"threads": arguments.threads, "dtype": "bfloat16", "read_bytes": 1 << 26 if arguments.quick else 3 << 29}
    with apart("limits", sys.executable, "limits", read, arguments.out / "logs") as limits:
        for axis in arguments.axes:
            found = _axis(axis, arguments, limits)
            _report(axis, found, arguments.out)
            record[axis] = [{"x": each.x, "tok/s": each.rates, "limit tok/s": each.limits} for each in found]
    (arguments.out / "growth.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _axis(axis: str, arguments: argparse.Namespace, limits: Apart) -> list[Found]:
    """All points, one engine each: they differ in model or size of pool."""
    found = []
    for point in QUICK[axis] if arguments.quick else AXES[axis][1]:
        folder = _folder(point.model, arguments.model_dir)
        shape = ModelShape.of(folder)
        rates, most = [], []
        options = {"threads": arguments.threads, "engine": _engine(folder, point, arguments.backend)}
        with apart("streamkv", sys.executable, "streamkv_engine", options, arguments.out / "logs") as engine:
            for turn in range((1 if arguments.quick else arguments.repeats) + 1):
                jobs = point.jobs(random.Random(f"{axis} {point} {turn}"))
                machine = Machine(**limits.ask(None, TIMEOUT_S))
                served = Served(**engine.ask([[job.prompt, job.max_tokens] for job in jobs], TIMEOUT_S))
                print(f"{axis}, {point}: {served.seconds:.1f} s", file=sys.stderr, flush=True)
                if turn:  # the first one is not timed
                    rates.append(figures(jobs, served)["decode"])
                    most.append(_limit(Ceiling(shape, machine), point))
        x = {"streams": point.streams, "context": point.context, "model": shape.body + 2 * shape.head}[axis]
        found.append(Found(float(x), point, rates, most))
    return found


def _limit(ceiling: Ceiling, point: Point) -> float:
    """In the middle of what is timed."""
    ahead = point.streams * point.context // BUDGET
    return point.streams / ceiling.step_s([point.context + ahead // 2 + STEPS // 2] * point.streams)


def _folder(model: str, where: Path) -> Path:
    """With a configuration, and no weights."""
    folder, sizes = where / f"growth-{model}", MODELS[model]
    heads = sizes["hidden_size"] // 64
    if not (folder / "config.json").is_file():
        config = make_config(
            vocab_size=VOCAB,
            **sizes,
            num_attention_heads=heads,
            num_key_value_heads=min(8, heads // 2),
            head_dim=64,
            max_position_embeddings=8192,
            dtype="bfloat16",
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
    return folder


def _engine(folder: Path, point: Point, backend: str) -> dict[str, Any]:
    return {
        "model": str(folder),
        "backend": backend,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "num_blocks": max(256, point.kv_tokens // 16),
        "max_num_seqs": 256,
        "max_num_batched_tokens": BUDGET,
    }


def _report(axis: str, found: Sequence[Found], out: Path) -> None:
    label = AXES[axis][0]
    rows = []
    for each in found:
        share = median(rate / limit for rate, limit in zip(each.rates, each.limits, strict=True))
        own, most = each.step_ms(each.rates), each.step_ms(each.limits)
        rows.append((f"{each.x:,.0f}", f"{median(each.rates):.1f}", f"{own:.1f}", f"{most:.1f}", f"{100 * share:.0f} %"))
    header = [label, "tok/s, median", "step ms", "limit ms", "of the limit"]
    print_table(f"Growth with {axis}", header, rows)
    series = {
        "StreamKV": [(each.x, each.step_ms(each.rates)) for each in found],
        "the machine's limit": [(each.x, each.step_ms(each.limits)) for each in found],
    }
    picture = curves(f"Cost of a step, by {axis}", label, "milliseconds", series, limits=["the machine's limit"])
    (out / f"{axis}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()

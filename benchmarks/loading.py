"""Loading a model: peak resident memory and seconds, through the engine, beside transformers' `from_pretrained`.

python -m benchmarks.loading [--model-dir DIR] [--quick]

Each figure comes from a process of its own, which reads its peak from /proc/self/status; Linux only. The engine's run goes from
the folder to an engine that is ready, with its pool of 16 MiB; transformers' run is `from_pretrained` and one token, because
until it is used a mapped weight is in no memory. The files are in the page cache in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR

POOL: Final = 16 * 2**20
FIXED: Final = 400_000_000
"""What a process may take beside the weights: torch and transformers are 350 MB of it."""

_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "254M": {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "head_dim": 64},
    "1.2B": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "55M": {"vocab_size": 64_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64},
    "40M": {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64},
}


@dataclass(frozen=True)
class Case:
    """A model and how it is stored and loaded."""

    shape: str
    stored: str = "bfloat16"
    loaded: str = "auto"
    tied: bool = False
    shard: str = "50GB"

    @property
    def label(self) -> str:
        """For the table and the folder's name."""
        parts = [self.shape, self.stored]
        parts += [f"loaded as {self.loaded}"] if self.loaded != "auto" else []
        return ", ".join([*parts, *(["tied"] if self.tied else []), *(["sharded"] if self.shard != "50GB" else [])])


CASES: Final = [
    Case("254M", "float32"),
    Case("254M"),
    Case("254M", tied=True, shard="100MB"),
    Case("254M", "float32", "bfloat16", shard="200MB"),
    Case("1.2B", tied=True, shard="500MB"),
]
QUICK: Final = [
    Case("40M", "float32", shard="50MB"),
    Case("55M", tied=True),
    Case("40M", "float32", "bfloat16", shard="50MB"),
]


@dataclass(frozen=True)
class Figures:
    """Bytes and seconds of one run.

    Attributes:
        weights: of the parameters in the dtype they are computed in; tied ones once.
        base: resident before loading, with everything imported.
        peak: most resident at once.
    """

    weights: int
    base: int
    peak: int
    seconds: float

    @property
    def allowed(self) -> int:
        """1.3 times the weights, the pool and what every process takes."""
        return int(1.3 * self.weights) + POOL + FIXED


def build(folder: Path, case: Case) -> Path:
    """Write the model from its seed, unless it is there."""
    target = folder / "loading" / case.label.replace(", ", "-").replace(" ", "-")
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = _SHAPES[case.shape]
    heads = shape["hidden_size"] // shape["head_dim"]
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=case.tied,
        dtype=case.stored,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, case.stored))  # noqa: SLF001  # in its dtype at once
    model.save_pretrained(target, max_shard_size=case.shard)
    return target


def measure(target: Path, case: Case, how: str) -> Figures:
    """One run in a new process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--child", how, str(target), case.loaded]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    return Figures(**json.loads(output.splitlines()[-1]))


def _child(how: str, folder: Path, dtype: str) -> Figures:
    import transformers.models.llama.modeling_llama  # noqa: F401  # part of every process, and not of loading

    run = _engine if how == "engine" else _transformers
    run(_small(folder), "auto")  # everything else that is imported at first use
    base = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    began = perf_counter()
    weights = run(folder, dtype)
    return Figures(weights, base, _status("VmHWM"), perf_counter() - began)


def _small(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder.parent / "small"
    if not (target / "config.json").is_file():
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(**sizes, dtype="bfloat16")).bfloat16().save_pretrained(target)
    return target


def _engine(folder: Path, dtype: str) -> int:
    import streamkv.engine.build as engine_build
    from streamkv.engine.config import EngineConfig

    weights = 0
    load_model = engine_build.load_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal weights
        model = load_model(*args, **kwargs)
        shapes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = _parameters(shapes) * model.dtype.itemsize
        return model

    async def run() -> None:
        async with engine_build.build_engine(EngineConfig(model=str(folder), dtype=dtype, kv_cache_memory=POOL)):
            pass

    engine_build.load_model = counted
    try:
        asyncio.run(run())
    finally:
        engine_build.load_model = load_model
    return weights


def _parameters(config: dict[str, Any]) -> int:
    """Of a Llama; packed layers do not tell theirs any more."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width, groups = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    layer = 2 * hidden * width * (heads + groups) + 3 * hidden * inner + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return int(config["num_hidden_layers"] * layer + embeddings + hidden)


def _transformers(folder: Path, dtype: str) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        module(torch.tensor([[0]]))
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory and seconds of loading")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--child", nargs=3, metavar=("HOW", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        how, folder, dtype = arguments.child
        print(json.dumps(vars(_child(how, Path(folder), dtype))))
        return
    print_setting("streamkv", "torch", "transformers", "safetensors")
    rows = []
    for case in QUICK if arguments.quick else CASES:
        target = build(arguments.model_dir.absolute(), case)
        for how in ("engine", "transformers"):
            measure(target, case, how)  # files into the page cache
            figures = measure(target, case, how)
            above = (figures.peak - figures.base) / figures.weights
            numbers = [f"{value / 1e6:.0f}" for value in (figures.weights, figures.peak, figures.allowed)]
            rows.append([case.label, how, *numbers, f"{above:.2f}", f"{figures.seconds:.2f}"])
    columns = ["model", "loaded by", "weights, MB", "peak, MB", "allowed, MB", "(peak - before) / weights", "seconds"]
    print_table("peak resident memory of loading", columns, rows)


if __name__ == "__main__":
    main()

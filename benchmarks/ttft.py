"""Time to the first token, cold and with the prefix in the cache: one request at a time, 254M model of `workloads`.

python -m benchmarks.ttft [--rounds 9] [--prefixes 128 512 1024 2048] [--quick]

Every round draws new token ids. It sends prefix + 32 tokens twice, with another 32 the second time: the first is cold, the
second finds the prefix. Measured through `Engine`, from the call to the first token that the caller sees.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.async_engine import Engine
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.sampling_params import SamplingParams

OWN = 32
PARAMS = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="time to first token, cold and with a cached prefix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[128, 512, 1024, 2048], help="tokens of the shared prefix")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 rounds: shows that it runs")
    arguments = parser.parse_args()
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> None:
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    vocab_size = 512 if arguments.quick else 32_000
    rounds = 2 if arguments.quick else arguments.rounds
    source = random.Random(arguments.seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(3, vocab_size) for _ in range(count)]

    rows = []
    config = EngineConfig(model=str(folder), backend=arguments.backend, num_blocks=(rounds + 2) * 256)
    async with Engine(config) as engine:
        for length in arguments.prefixes:
            cold, hit, saved = [], [], 0
            for turn in range(rounds + 1):
                prefix = tokens(length)
                first, _ = await _first_token(engine, prefix + tokens(OWN))
                second, saved = await _first_token(engine, prefix + tokens(OWN))
                if saved < length // config.block_size * config.block_size:
                    raise RuntimeError(f"only {saved} of {length} prefix tokens came from the cache")
                if turn:  # the first one is not timed
                    cold.append(first)
                    hit.append(second)
            ratio = median(a / b for a, b in zip(cold, hit, strict=True))
            rows.append((f"{length} + {OWN}", _ms(cold), _ms(hit), f"{ratio:.1f} ×", saved))
    header = ["prefix + own tokens", "cold ms, median (p90)", "hit ms, median (p90)", "cold / hit", "tokens from the cache"]
    print_table(f"Time to first token; {rounds} rounds", header, rows)


async def _first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """(seconds, prompt tokens that came from the cache)."""
    start = perf_counter()
    async for output in engine.generate(prompt, PARAMS):
        seconds = perf_counter() - start
        cached = output.num_cached_tokens
    return seconds, cached


def _ms(seconds: list[float]) -> str:
    return f"{median(seconds) * 1000:.1f} ({percentile(seconds, 0.9) * 1000:.1f})"


if __name__ == "__main__":
    main()

"""How long a preempted request takes to come back: its blocks moved in from the host, or its tokens computed again.

python -m benchmarks.swap [--rounds 5] [--lengths 128 512 1024] [--quick]

A request with so many tokens gets one token and then waits for credit; another one takes all blocks and ends. What is timed is
from the credit to the first request's next token. Two engines take turns: one with host slots, one without. Neither has a prefix
cache, which the other request would have emptied anyway. Model: 254M, float32, of `workloads`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.report import percentile, print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.engine.api import EngineClient, EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.sampling_params import Sampling

BLOCK = 16
ENOUGH = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description="time to come back by swap against recomputing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024], help="tokens that were lost")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 rounds: shows that it runs")
    arguments = parser.parse_args()
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> None:
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    vocab_size = 512 if arguments.quick else 32_000
    rounds = 2 if arguments.quick else arguments.rounds
    rows = []
    for length in [128] if arguments.quick else arguments.lengths:
        async with AsyncExitStack() as stack:
            callers = []
            for swap_memory in (ENOUGH, 0):
                config = EngineConfig(
                    model=str(folder),
                    backend=arguments.backend,
                    block_size=BLOCK,
                    num_blocks=length // BLOCK + 4,
                    enable_prefix_caching=False,
                    swap_memory=swap_memory,
                )
                engine = await stack.enter_async_context(build_engine(config))
                callers.append(Caller(engine, random.Random(length), vocab_size))
                if swap_memory:
                    cost = engine._scheduler.cache.host.block_tokens  # noqa: SLF001  # measured at start, and only logged
            moved, computed = callers
            for caller in callers:
                await caller.time_back(length)  # the first one is not timed
            pairs = [(await moved.time_back(length), await computed.time_back(length)) for _ in range(rounds)]
            swapped = (await moved.engine.stats()).swapped_in
            if swapped != (rounds + 1) * -(-length // BLOCK) or (await computed.engine.stats()).swapped_in:
                raise RuntimeError(f"{swapped} blocks were moved in: not every return was by swap, or one was that should not be")
        ratio = median(computed / moved for moved, computed in pairs)
        rows.append((length, _ms([a for a, _ in pairs]), _ms([b for _, b in pairs]), f"{ratio:.1f} ×", f"{cost:.2f}"))
    header = [
        "tokens lost",
        "swap ms, median (p90)",
        "recompute ms, median (p90)",
        "recompute / swap",
        "a block is worth, tokens",
    ]
    print_table(f"From credit to the next token; {rounds} rounds", header, rows)


class Caller:
    """One engine, and what it says."""

    def __init__(self, engine: EngineClient, source: random.Random, vocab_size: int) -> None:
        self.engine = engine
        self._steps = engine.steps()
        self._count = 0
        self._tokens: Callable[[int], list[int]] = lambda count: [source.randrange(3, vocab_size) for _ in range(count)]

    async def time_back(self, length: int) -> float:
        """Seconds from the credit to the next token of a request that has lost `length` tokens."""
        self._count += 1
        waits, large = f"waits{self._count}", f"large{self._count}"
        await self.engine.submit(EngineRequest((waits,), self._tokens(length), Sampling(max_tokens=2, temperature=0.0), credit=1))
        await self._until(waits, tokens=1)
        await self.engine.submit(EngineRequest((large,), self._tokens(length), Sampling(max_tokens=1, temperature=0.0)))
        await self._until(large, tokens=1)
        start = perf_counter()
        await self.engine.credit(waits, 2)
        await self._until(waits, tokens=1)
        return perf_counter() - start

    async def _until(self, request_id: str, *, tokens: int) -> None:
        async for batch in self._steps:
            if any(output.id == request_id and len(output.token_ids) >= tokens for output in batch.outputs):
                return


def _ms(seconds: list[float]) -> str:
    return f"{median(seconds) * 1000:.1f} ({percentile(seconds, 0.9) * 1000:.1f})"


if __name__ == "__main__":
    main()

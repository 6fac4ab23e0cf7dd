"""Memory that runs out at 1,000 random points of loading tables, copying blocks, forward passes and sampling.

python -m benchmarks.out_of_memory [--points 1000] [--seed 1] [--quick]

The engine, its runner and the model (a tiny Llama in float32) are real; the reference is the same requests on the same engine
while memory lasts. Fails unless 99 % of the requests end with the reference's tokens, nobody else is hurt, and no block is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from transformers.utils import logging

from benchmarks.report import print_setting, print_table
from streamkv.engine.build import build_engine
from streamkv.logs import configure_logs
from tests.engine.driving import run_all
from tests.engine.short_of_memory import NUM_BLOCKS, again, make_wave, running_out, small_engine
from tests.runner.tiny import save_tiny

MOST = 8000
"""Operations of torch between two points, 1 at least. A step has some 700, so that every sixth fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description="memory that runs out anywhere")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 points: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.points = 20
    logging.disable_progress_bar()
    print_setting("streamkv", "torch", "transformers")
    configure_logs(level="critical")
    asyncio.run(_measure(arguments.points, random.Random(arguments.seed)))


async def _measure(most: int, source: random.Random) -> None:
    ends: Counter[str] = Counter()
    points = wave = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        async with build_engine(small_engine(save_tiny(Path(folder)))) as engine:
            while points < most:
                requests = make_wave(source, wave)
                async with running_out(engine, source, 1, MOST) as mode:
                    found = await run_all(engine, requests)
                expected = await run_all(engine, [again(request) for request in requests])
                for name, collected in found.items():
                    error = collected.last.error
                    same = collected.tokens == expected[f"{name} again"].tokens
                    ends[error[0] if error is not None else "reference" if same else "other tokens"] += 1
                points += mode.points
                wave += 1
            stats = await engine.stats()
    lost = NUM_BLOCKS - stats.blocks_free - stats.blocks_cached
    total = ends.total()
    row = [points, total, ends["reference"], ends["out_of_memory"], total - ends["reference"] - ends["out_of_memory"], lost]
    header = ["points", "requests", "ended with the reference's tokens", "`out_of_memory`", "ended otherwise", "blocks lost"]
    print_table(f"Memory ran out, in {time.monotonic() - began:.0f} s", header, [row])
    if lost or row[4] or ends["reference"] < 0.99 * total:
        raise SystemExit("that is too much")


if __name__ == "__main__":
    main()

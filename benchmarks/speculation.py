"""What speculation by look-up gains: answers that copy long pieces of their prompt, some of them, or nothing.

python -m benchmarks.speculation [--rounds 3] [--streams 1 8] [--quick]

The model is that of `benchmarks.workloads` (254M parameters, bfloat16). Its weights are random, so it copies nothing of its own
accord: every forward pass, every check of drafts and every block is real, and the token that is "sampled" is read from a script,
the answer that a model for such work would give. Both engines serve the same prompts, one after the other in every round.

    edit        the prompt's 400 tokens again, every 40th one changed
    quotations  pieces of 40 tokens from the prompt, 20 new ones between them
    chat        400 tokens that have nothing to do with the prompt
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.core.step import Step
from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.runner.model_runner import ModelRunner
from streamkv.runner.params import RowParams
from streamkv.sampling_params import Sampling

LENGTH = 400


class Scripted(ModelRunner):
    """Computes everything and says what the script says."""

    scripts: dict[tuple[int, ...], list[int]]

    def _take_over(self, step: Step, params: Mapping[int, RowParams]) -> None:
        super()._take_over(step, params)
        for row, _ in step.admitted:
            self._lines[row] = self.scripts[tuple(params[row].tokens[: params[row].num_prompt])]

    @property
    def _lines(self) -> dict[int, list[int]]:
        return self.__dict__.setdefault("lines", {})

    def _choose(self, rows: Any, positions: Any, logits: torch.Tensor) -> Any:
        _, finite = super()._choose(rows, positions, logits)
        lines = [self._lines[row] for row in rows.tolist()]
        said = [line[position] if position < len(line) else 0 for line, position in zip(lines, positions.tolist(), strict=True)]
        return torch.tensor(said), finite


def main() -> None:
    arguments = _arguments()
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    asyncio.run(_run(arguments))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what speculation by look-up gains")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    return parser.parse_args()


def script(kind: str, random: Random, vocab: int) -> tuple[list[int], list[int]]:
    """(prompt, answer)."""
    prompt = [random.randrange(3, vocab) for _ in range(LENGTH)]
    new = [random.randrange(3, vocab) for _ in range(LENGTH)]
    if kind == "edit":
        answer = [new[i] if i % 40 == 39 else token for i, token in enumerate(prompt)]
    elif kind == "quotations":
        answer = []
        while len(answer) < LENGTH:
            place = random.randrange(LENGTH - 40)
            answer += prompt[place : place + 40] + new[len(answer) : len(answer) + 20]
        answer = answer[:LENGTH]
    else:
        answer = new
    return prompt, answer


async def _run(arguments: argparse.Namespace) -> None:
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    vocab = 250 if arguments.quick else 30_000
    async with AsyncExitStack() as stack:
        engines = {}
        with patch("streamkv.engine.build.ModelRunner", Scripted):
            for kind in ("off", "ngram"):
                config = EngineConfig(
                    model=str(folder), dtype="bfloat16", num_blocks=1200, speculation=kind, enable_prefix_caching=False
                )
                engines[kind] = await stack.enter_async_context(build_engine(config))
        rows = []
        for work in ("edit", "quotations", "chat"):
            for streams in arguments.streams:
                rows.append(await _compare(engines, work, streams, arguments.rounds, vocab))
                print(*rows[-1], flush=True)
    print_table(
        "output tokens a second, speculation off and on, and the share of proposed tokens that were right",
        ["answers", "streams", "off", "on", "on / off", "accepted"],
        rows,
    )


async def _compare(engines: dict[str, Any], work: str, streams: int, rounds: int, vocab: int) -> list[str]:
    speeds: dict[str, list[float]] = {kind: [] for kind in engines}
    before = await engines["ngram"].stats()
    for index in range(rounds + 1):
        scripts = [script(work, Random(f"{work} {index} {stream}"), vocab) for stream in range(streams)]
        Scripted.scripts = {tuple(prompt): prompt + answer for prompt, answer in scripts}
        for kind, engine in engines.items():
            seconds = await _serve(engine, scripts)
            if index:  # the first round warms up
                speeds[kind].append(streams * LENGTH / seconds)
    after = await engines["ngram"].stats()
    proposed = after.draft_tokens - before.draft_tokens
    right = f"{(after.accepted_tokens - before.accepted_tokens) / proposed:.0%} of {proposed}" if proposed else "none proposed"
    off, on = median(speeds["off"]), median(speeds["ngram"])
    return [work, str(streams), f"{off:.0f}", f"{on:.0f}", f"{on / off:.2f}", right]


async def _serve(engine: Any, scripts: list[tuple[list[int], list[int]]]) -> float:
    """Seconds from the first token of the first answer to the last of all."""
    names = [f"r{index}" for index in range(len(scripts))]
    done: set[str] = set()
    began = 0.0

    async def read() -> None:
        nonlocal began
        async for batch in engine.steps():
            for output in batch.outputs:
                if output.token_ids and not began:
                    began = perf_counter()
                if output.finish_reason is not None:
                    done.add(output.id)
            if len(done) == len(names):
                return

    reader = asyncio.create_task(read())
    for name, (prompt, answer) in zip(names, scripts, strict=True):
        await engine.submit(EngineRequest((name,), prompt, Sampling(max_tokens=len(answer), temperature=0.0)))
    await reader
    return perf_counter() - began


if __name__ == "__main__":
    main()

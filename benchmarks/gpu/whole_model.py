"""A model in the shape of Llama-3.1-8B with random weights, end to end: a program of its own for each engine, for its memory.

python -m benchmarks.gpu.whole_model ENGINE --folder MODEL [--device cuda] [--tiny] [--read BYTES_PER_S]

ENGINE is streamkv, served, generate or batching.

Prints a row of JSON for each figure. Every stream has a prompt of its own of 128 tokens and gets 128 tokens, the most probable
ones. Where nothing is timed (`--device emulated`), figures are null.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import torch

__all__ = ["ENGINES", "main", "save_config"]

ENGINES: Final = ("streamkv", "served", "generate", "batching")


@dataclass(frozen=True)
class Run:
    """What is asked for, and whether it is timed."""

    folder: Path
    device: str
    tiny: bool
    read: float

    @property
    def timed(self) -> bool:
        """False where kernels are emulated."""
        return self.device != "emulated"

    @property
    def place(self) -> str:
        """Torch's name of the device."""
        return self.device if self.timed else "cpu"

    @property
    def streams(self) -> tuple[int, ...]:
        """Numbers of streams at once."""
        return (1, 2) if self.tiny else (1, 8, 32, 128, 256)

    @property
    def length(self) -> int:
        """Tokens of a prompt, and of an output."""
        return 8 if self.tiny else 128

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Unlike each other, and unlike those of the last call."""
        vocab = json.loads((self.folder / "config.json").read_text())["vocab_size"]
        source = random.Random(time.monotonic_ns())
        return [[source.randrange(vocab) for _ in range(length)] for _ in range(count)]

    def row(self, engine: str, streams: int, marks: list[list[float]], begun: float, note: str = "") -> None:
        """Print what streams gave.

        Args:
            marks: for each stream when its tokens came, in seconds.
        """
        gaps = [after - before for one in marks for before, after in pairwise(one)]
        gap = quantiles(gaps, n=100) if len(gaps) > 1 else [0.0] * 99
        figures = {
            "tok/s": sum(map(len, marks)) / (max(one[-1] for one in marks) - begun),
            "ITL p50 ms": 1e3 * gap[49],
            "ITL p99 ms": 1e3 * gap[98],
            "TTFT p50 ms": 1e3 * (median(one[0] for one in marks) - begun),
        }
        self.say({"engine": engine, "streams": streams, **figures, "note": note})

    def say(self, row: dict[str, Any]) -> None:
        """Print a row; without its figures where nothing is timed."""
        if not self.timed:
            row = {name: None if isinstance(value, float) else value for name, value in row.items()}
        print(json.dumps(row), flush=True)


def save_config(folder: Path, *, tiny: bool) -> Path:
    """A folder with the configuration and no weights, and a tokenizer with a word for every token."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig

    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
    if tiny:
        shape = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(**shape, **heads, **ids, rope_parameters=rope, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(shape["vocab_size"])}
    Tokenizer(models.WordLevel(vocab=words, unk_token="w0")).save(str(folder / "tokenizer.json"))  # noqa: S106  # of text
    return folder


def engine_config(run: Run) -> Any:
    """StreamKV's settings."""
    from streamkv.engine.config import EngineConfig

    return EngineConfig(
        model=str(run.folder),
        backend="cuda",
        device=run.device,
        dtype="bfloat16",
        load_format="dummy",
        num_blocks=32 if run.tiny else None,
        memory_fraction=0.9,
        max_model_len=256 if run.tiny else 9216,
        max_num_seqs=4 if run.tiny else 256,
        max_num_batched_tokens=64 if run.tiny else 8192,
    )


# -- StreamKV's engine, in this process -----------------------------------------------------------------------------------


async def streamkv(run: Run) -> None:
    """The engine without a server: streams, a long prompt, what of reading one stream is, and steps watched for waiting."""
    from streamkv.engine.build import build_engine

    begun = time.perf_counter()
    async with build_engine(engine_config(run)) as engine:
        loaded = time.perf_counter() - begun
        while run.timed and engine._ahead and time.perf_counter() - begun < 60:  # noqa: SLF001  # no other way to know
            await asyncio.sleep(0.1)
        info, ready = engine.describe(), time.perf_counter() - begun
        say = {"seconds to load": loaded, "and to record": ready - loaded, "KV tokens": info.num_blocks * info.block_size}
        run.say({"engine": "streamkv", **say})
        runner: Any = engine._runner  # noqa: SLF001  # as above
        weights = sum(one.numel() * one.element_size() for one in runner._model.module.parameters())  # noqa: SLF001  # as above
        embedding = runner._model.module.get_input_embeddings().weight  # noqa: SLF001  # one row of it is read
        per_token = weights - embedding.numel() * embedding.element_size()
        steps = _Steps(engine)
        await steps.run(run.prompts(2, run.length), run.length)  # whatever comes for the first time
        with _watched(runner) as waits:
            begun = time.monotonic()
            await steps.run(run.prompts(2, run.length), run.length)
        run.say({"engine": "streamkv", "launches that were watched": waits.count, "that waited": len(waits.found)})
        for place in sorted(set(waits.found))[:5]:
            run.say({"engine": "streamkv", "a launch waited at": place})
        for streams in run.streams:
            begun = time.monotonic()
            marks = await steps.run(run.prompts(streams, run.length), run.length)
            run.row("streamkv", streams, marks, begun)
            if streams == 1:
                gaps = [after - before for before, after in pairwise(marks[0])]
                share = per_token / median(gaps) / run.read if run.read else None
                run.say({"engine": "streamkv", "GB of weights a token": per_token / 1e9, "of reading at one stream": share})
        for length in (40,) if run.tiny else (512, 2048, 8192):
            begun = time.monotonic()
            ((first, *_),) = await steps.run(run.prompts(1, length), 1)
            run.say({"engine": "streamkv", "prompt": length, "TTFT ms": 1e3 * (first - begun), "tok/s": length / (first - begun)})


class _Steps:
    """The one consumer of an engine's steps."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._steps = engine.steps()
        self._next = 0

    async def run(self, prompts: Sequence[list[int]], tokens: int) -> list[list[float]]:
        """When the tokens of each came."""
        from streamkv.engine.api import EngineRequest
        from streamkv.sampling_params import Sampling

        marks: dict[str, list[float]] = {}
        for prompt in prompts:
            name, self._next = str(self._next), self._next + 1
            marks[name] = []
            await self._engine.submit(EngineRequest((name,), prompt, Sampling(max_tokens=tokens, temperature=0.0)))
        open_ones = set(marks)
        while open_ones:
            batch = await anext(self._steps)
            for output in batch.outputs:
                assert output.error is None, output.error
                marks[output.id] += [batch.at] * len(output.token_ids)
                if output.finish_reason is not None:
                    open_ones.discard(output.id)
        return list(marks.values())


@dataclass
class _Waits:
    """Launches, and where they waited for the device."""

    count: int
    found: list[str]


@contextmanager
def _watched(runner: Any) -> Any:
    """Inside the block torch says where a launch of decodes waits for the device (`torch.cuda.set_sync_debug_mode`)."""
    waits, launch = _Waits(0, []), runner.launch

    def watched(step: Any, params: Any) -> Any:
        if not torch.cuda.is_available() or step.num_tokens > len(step.rows):
            waits.count += step.num_tokens == len(step.rows)
            return launch(step, params)
        waits.count += 1
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return launch(step, params)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.found += [f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message)]

    runner.launch = watched
    try:
        yield waits
    finally:
        del runner.launch


# -- StreamKV's server, with a client beside it ------------------------------------------------------------------------------


async def served(run: Run) -> None:
    """As `streamkv serve` puts it together, with its client on the other end of a real socket, in the same process."""
    from streamkv.client import connect
    from streamkv.engine.build import build_engine
    from streamkv.protocol.limits import SessionLimits
    from streamkv.server.app import Server
    from streamkv.server.config import ServerConfig
    from streamkv.text.streams import TextStreams
    from streamkv.text.tokenizer import load_tokenizer

    async with build_engine(engine_config(run)) as engine:
        tokenizer = load_tokenizer(run.folder, max_tokens=engine.describe().max_model_len)
        async with TextStreams(engine, tokenizer) as streams:
            server = Server(streams, ServerConfig(port=0, limits=SessionLimits(streams=max(run.streams))))
            async with server.listening(), connect(f"ws://127.0.0.1:{server.port}/v1/stream") as client:

                async def read(prompt: list[int]) -> list[float]:
                    marks: list[float] = []
                    stream = client.complete(prompt, max_tokens=run.length, temperature=0.0, ignore_eos=True)
                    async for delta in stream:
                        marks += [time.monotonic()] * delta.n
                    assert stream.num_tokens == len(marks) == run.length
                    return marks

                await read(run.prompts(1, run.length)[0])
                for count in run.streams:
                    begun = time.monotonic()
                    marks = await asyncio.gather(*map(read, run.prompts(count, run.length)))
                    run.row("streamkv, served", count, list(marks), begun)


# -- transformers ------------------------------------------------------------------------------------------------------------


def _transformers_model(run: Run, attention: str) -> Any:
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(run.folder)
    config._attn_implementation = attention  # noqa: SLF001  # what from_pretrained would set
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(run.place):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def generate(run: Run) -> None:
    """`generate` over a batch of equal lengths, which is what it likes best."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is Any here
        """Is asked after every token."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if run.timed:
                torch.cuda.synchronize()
            self.marks.append(time.monotonic())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model = _transformers_model(run, "sdpa")
    for turn, streams in enumerate((run.streams[0], *run.streams)):
        clock = Clock()
        prompts = torch.tensor(run.prompts(streams, run.length), device=run.place)
        more = {"max_new_tokens": run.length, "min_new_tokens": run.length, "do_sample": False, "pad_token_id": 0}
        begun = time.monotonic()
        model.generate(prompts, stopping_criteria=StoppingCriteriaList([clock]), attention_mask=torch.ones_like(prompts), **more)
        if turn:  # the first is to warm up
            run.row("transformers generate", streams, [clock.marks] * streams, begun)


def batching(run: Run) -> None:
    """Continuous batching of transformers; when tokens came where it tells that, else only how long all took."""
    from transformers import GenerationConfig

    model = _transformers_model(run, "sdpa")
    more: dict[str, Any] = {}
    if "record_timestamps" in inspect.signature(model.generate_batch).parameters:
        more["record_timestamps"] = True
    if run.tiny:  # else it takes all of the memory for its cache
        from transformers import ContinuousBatchingConfig

        more["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    length = {"max_new_tokens": run.length, "min_new_tokens": run.length}
    wish = GenerationConfig(**length, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for turn, streams in enumerate((run.streams[0], *run.streams)):
        prompts = run.prompts(streams, run.length)
        begun, since = time.monotonic(), time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=wish, **more).values()
        spent, tokens = time.monotonic() - begun, sum(len(one.generated_tokens) for one in outputs)
        if turn:
            note = f"{tokens} of {streams * run.length} tokens, setting up included"
            told = [[mark - since for mark in one.timestamps or []] for one in outputs]
            marks = told if all(told) else [[spent] * (tokens // streams)] * streams
            run.row("transformers continuous batching", streams, marks, 0.0, note)


PROGRAMS: Final[dict[str, Callable[[Run], Any]]] = {
    "streamkv": streamkv,
    "served": served,
    "generate": generate,
    "batching": batching,
}


def main(arguments: list[str]) -> int:
    """Print rows.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.whole_model", description="a model end to end")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--folder", type=Path, required=True, help="as save_config makes it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--read", type=float, default=0.0, help="bytes a second that the device reads at most")
    options = parser.parse_args(arguments)
    run = Run(options.folder, options.device, options.tiny, options.read)
    found = PROGRAMS[options.engine](run)
    if found is not None:
        asyncio.run(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

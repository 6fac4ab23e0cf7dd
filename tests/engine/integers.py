"""An engine whose model is `tests.core.model.SlotMemory`: all of it real but the forward pass, which is arithmetic."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Sampled, Step
from streamkv.engine.api import EngineInfo, EngineRequest
from streamkv.engine.engine import InProcessEngine
from streamkv.engine.thread import Done, RunnerThread
from streamkv.runner.params import RowExtra, RowParams
from streamkv.runner.prompt_reader import PromptReader
from streamkv.sampling_params import PromptLogprobs, Sampling, TokenLogprobs
from tests.core.model import VOCAB, SlotMemory

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS = 64, 4, 8


class IntegerRunner:
    """Carries out steps on slots. `fault` may raise, or name requests whose row comes out as NaN; `gate` holds steps back."""

    def __init__(self) -> None:
        self.memory = SlotMemory(NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS)
        self.fault: Callable[[Step, list[str]], frozenset[str]] = lambda _step, _names: frozenset()
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()
        self.prompts = PromptReader()
        self.params: dict[int, RowParams] = {}
        self.steps = 0
        self._failed = False

    def launch(self, step: Step, params: Mapping[int, RowParams]) -> Done[Sampled]:
        return Done(self._run(step, params))

    def _run(self, step: Step, params: Mapping[int, RowParams]) -> Sampled:
        assert self.gate.wait(60), "a test forgot to open the gate"
        self.threads.add(threading.current_thread().name)
        self.steps += 1
        assert set(params) == {row for row, _ in step.admitted}
        self.params |= params
        for row, wanted in params.items():
            self.prompts.admit(row, wanted)
        if self._failed:
            self.memory.update(step)
            raise RuntimeError("skipped")
        names = dict(step.admitted)
        members = [names.get(row, self.memory.names[row]) for row in step.rows]
        try:
            nan = self.fault(step, members)
        except BaseException:
            self.memory.update(step)
            self._failed = True
            raise
        sampled = self.memory.run(step, fail=nan)
        return replace(sampled, extras=self._extras(step))

    def _extras(self, step: Step) -> dict[int, RowExtra]:
        """A prompt token's log-probability is minus its position; a vector holds the length of its prompt."""
        extras: dict[int, RowExtra] = {}
        arrays = [np.asarray(numbers, np.int64) for numbers in (step.rows, step.starts, step.counts)]
        for part in self.prompts.ranges(*arrays):
            entries = tuple(TokenLogprobs(-float(position + 1)) for position in range(part.start, part.end))
            extras[part.entry] = RowExtra(prompt_logprobs=PromptLogprobs(part.start + 1, entries))
        for entry, row in enumerate(step.rows):
            if self.params[row].pooling is not None and step.samples[entry]:
                extras[entry] = RowExtra(embedding=struct.pack("<f", self.params[row].num_prompt))
        return extras

    def record_ahead(self) -> bool:
        return False

    def resume(self) -> None:
        self._failed = False


@asynccontextmanager
async def integer_engine(**options: Any) -> AsyncIterator[tuple[InProcessEngine, IntegerRunner]]:
    """A started engine that proves its invariants after every commit."""
    look_ahead, clock = options.pop("look_ahead", True), options.pop("clock", time.monotonic)
    settings = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 32, "max_model_len": 128} | options
    scheduler = Scheduler(SchedulerConfig(**settings), KVCache(NUM_BLOCKS, BLOCK_SIZE))
    runner = IntegerRunner()
    info = EngineInfo(
        model="integers",
        max_model_len=settings["max_model_len"],
        vocab_size=VOCAB,
        eos_token_ids=(),
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        backend="none",
        dtype="int",
        epoch="test",
        embedding_dim=1,
        logits_processors=("enabled",),
    )
    engine = InProcessEngine(scheduler, runner, RunnerThread(), info, look_ahead=look_ahead, clock=clock, check=True)
    engine.start()
    try:
        yield engine, runner
    finally:
        runner.gate.set()
        await engine.close()
        assert not scheduler.live_ids()


def ask(name: str, prompt: list[int], max_tokens: int = 6, *, n: int = 1, **options: Any) -> EngineRequest:
    """A request whose samples are named as `tests.core.model.reference` expects."""
    ids = (name,) if n == 1 else tuple(f"{name}/{branch}" for branch in range(n))
    return EngineRequest(ids, prompt, Sampling(max_tokens=max_tokens), **options)

"""Memory that runs out at chosen operations of torch, in the runner's thread of an engine."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamkv.engine.api import EngineRequest
from streamkv.engine.config import EngineConfig
from streamkv.engine.engine import InProcessEngine
from streamkv.sampling_params import Sampling
from tests.runner.tiny import VOCAB

__all__ = ["NUM_BLOCKS", "RunsOut", "again", "make_wave", "running_out", "small_engine"]

NUM_BLOCKS = 64
_KINDS: list[dict[str, Any]] = [{}, {"logprobs": 2}, {"repetition_penalty": 1.3}, {"logit_bias": ((9, 2.0),)}]


class RunsOut(TorchDispatchMode):
    """After every `least` to `most` operations one fails for want of memory, as torch on a GPU says it."""

    def __init__(self, source: random.Random, least: int, most: int) -> None:
        super().__init__()
        self.points = 0
        """How often memory has run out."""
        self.operations = 0
        self._source = source
        self._least, self._most = least, most
        self._left = source.randint(least, most)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self._left -= 1
        if self._left == 0:
            self._left = self._source.randint(self._least, self._most)
            self.points += 1
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
            )
        return func(*args, **(kwargs or {}))


@asynccontextmanager
async def running_out(engine: InProcessEngine, source: random.Random, least: int, most: int) -> AsyncIterator[RunsOut]:
    """Inside the block memory runs out in the engine's runner: while it takes over, computes, samples or reads out."""
    mode = RunsOut(source, least, most)
    await engine._thread.submit(mode.__enter__)
    try:
        yield mode
    finally:
        await engine._thread.submit(mode.__exit__, None, None, None)


def small_engine(model: Path) -> EngineConfig:
    """Of a real model, with room for two thirds of a wave."""
    return EngineConfig(model=str(model), backend="torch", num_blocks=NUM_BLOCKS, max_num_seqs=8, max_num_batched_tokens=64)


def make_wave(source: random.Random, wave: int) -> list[EngineRequest]:
    """Requests of which some begin as others do, up to the middle of a block, so that blocks are shared and copied.

    None is drawn: a draw on the edge between two tokens falls on either, as the sums of another batch are rounded.
    """
    shared = [source.randrange(VOCAB) for _ in range(90)]
    requests: list[EngineRequest] = []
    for number in range(12):
        common = shared[: source.choice([0, 0, 25, 90])]
        prompt = common + [source.randrange(VOCAB) for _ in range(source.choice([1, 17, 60]))]
        sampling = Sampling(max_tokens=12, temperature=0.0, **source.choice(_KINDS))
        requests.append(EngineRequest((f"{wave}.{number}",), prompt, sampling))
    return requests


def again(request: EngineRequest) -> EngineRequest:
    """The same under another name."""
    return msgspec.structs.replace(request, ids=(f"{request.ids[0]} again",))

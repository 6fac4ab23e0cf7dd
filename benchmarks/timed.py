"""The real engine over a runner that only takes time: scheduler, blocks and steps are real, tokens are arithmetic.

And a byte-wise proxy, whose connections can be cut anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.workloads import make_tokenizer
from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Sampled, Step
from streamkv.engine.api import EngineClient, EngineInfo, EngineRequest
from streamkv.engine.engine import InProcessEngine
from streamkv.engine.thread import Done, RunnerThread
from streamkv.runner.params import RowParams
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer

__all__ = ["VOCAB", "Cost", "Proxy", "served", "timed_engine", "word_of"]

VOCAB = 1024


def word_of(request: EngineRequest, branch: int, position: int) -> int:
    """A token that depends on where it stands, so that one too many or too few shows in the text."""
    return 256 + (request.prompt[0] * 7919 + branch * 104_729 + position * 31) % (VOCAB - 256)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and of each of its tokens."""

    step_s: float
    token_s: float


class TimedRunner:
    """Sleeps as long as a model would compute."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost

    def launch(self, step: Step, _params: Mapping[int, RowParams]) -> Done[Sampled]:
        """One step."""
        time.sleep(self._cost.step_s + self._cost.token_s * step.num_tokens)
        tokens = [
            (256 + (step.id + row) % (VOCAB - 256),) if sampled else ()
            for row, sampled in zip(step.rows, step.samples, strict=True)
        ]
        return Done(Sampled(tokens))

    def record_ahead(self) -> bool:
        """There is nothing to record."""
        return False

    def resume(self) -> None:
        """Nothing has failed."""


@asynccontextmanager
async def timed_engine(
    cost: Cost, *, num_seqs: int, num_blocks: int = 4096, batched_tokens: int = 512
) -> AsyncIterator[InProcessEngine]:
    """Started; closed when the block is left."""
    settings = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=batched_tokens, max_model_len=4096)
    info = EngineInfo(
        model="timed",
        max_model_len=4096,
        vocab_size=VOCAB,
        eos_token_ids=(),
        block_size=16,
        num_blocks=num_blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=batched_tokens,
        backend="none",
        dtype="none",
        epoch="timed",
    )
    engine = InProcessEngine(Scheduler(settings, KVCache(num_blocks, 16)), TimedRunner(cost), RunnerThread(), info)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def served(engine: EngineClient, config: ServerConfig | None = None) -> AsyncIterator[Server]:
    """A listening server over an engine that has been started."""
    async with TextStreams(engine, TextTokenizer(make_tokenizer(VOCAB))) as streams:
        server = Server(streams, config or ServerConfig(port=0, drain_timeout_s=0.0))
        async with server.listening():
            yield server


class Proxy:
    """Passes bytes on, until `cut` resets a connection at whatever byte it is."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._server: asyncio.Server | None = None
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen inside the block."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self._server.close()
            while self._pairs:
                self._reset(0)

    def cut(self, source: random.Random) -> bool:
        """Reset one connection; False if there is none."""
        if not self._pairs:
            return False
        self._reset(source.randrange(len(self._pairs)))
        return True

    def _reset(self, index: int) -> None:
        for writer in self._pairs.pop(index):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        pair = (writer, back)
        self._pairs.append(pair)
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))
        if pair in self._pairs:
            self._pairs.remove(pair)

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 14):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

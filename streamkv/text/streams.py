"""The hub between an engine (token ids) and its readers (text): server, `Engine` and `LLM` all go through it.

It is the one consumer of the engine's steps. Per request it keeps an incremental detokenizer and the stop strings; per batch it
calls each reader's sink once, with all events of that batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import structlog

from streamkv.engine.api import EngineClient, EngineRequest, FinishReason, StepBatch
from streamkv.errors import DrainingError, InvalidRequestError
from streamkv.sampling_params import Pooling, SamplingParams
from streamkv.text.events import Finished, StreamEvent
from streamkv.text.observer import NullObserver, Observer
from streamkv.text.prepare import Preparer, Prompt
from streamkv.text.stream import ENGINE_LOST, PreparedPrompt, Sink, TextStream
from streamkv.text.tokenizer import TextTokenizer

__all__ = ["PreparedPrompt", "Prompt", "Sink", "TextStreams"]

log = structlog.get_logger(__name__)


class TextStreams:
    """Owns the consumer task and the tokenising threads. Use it as an async context manager."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: TextTokenizer,
        *,
        clock: Callable[[], float] = time.monotonic,
        threads: int = 1,
        observer: Observer | None = None,
    ) -> None:
        """Nothing runs before the block is entered.

        Args:
            clock: seconds; must be the engine's clock for timings to make sense.
            threads: threads that tokenise, so that the event loop never does.
            observer: told of every stream and every step.
        """
        self.client = client
        self.tokenizer = tokenizer
        self.info = client.describe()
        self._clock = clock
        self.observer = observer or NullObserver()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="streamkv-text")
        self._preparer = Preparer(self.info, tokenizer, self._pool)
        self._streams: dict[str, TextStream] = {}
        self._stopped: set[str] = set()  # ended here by a stop string; the engine's own end is still to come
        self._cancels: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._alive = False

    async def __aenter__(self) -> Self:
        self._alive = True
        self._task = asyncio.create_task(self._consume(), name="streamkv-text-streams")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for task in tuple(self._cancels):
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """False once the engine's steps have ended."""
        return self._alive

    @property
    def num_open(self) -> int:
        """Requests without their last event."""
        return len(self._streams)

    # -- in -------------------------------------------------------------------------------------------------------

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, *, is_chat: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> PreparedPrompt:
        """Tokenise off the event loop and check everything that can be checked before queueing.

        Raises:
            InvalidRequestError: empty prompt, token id out of range, unusable messages.
            ContextLengthError: prompt plus max_tokens exceed the context.
            DrainingError: the engine has stopped.
        """
        self._require_alive()
        return await self._preparer.generation(prompt, params, is_chat=is_chat, tools=tools)

    async def prepare_fork(
        self,
        parent: PreparedPrompt,
        output: Sequence[int],
        params: SamplingParams,
        *,
        chars: int | None = None,
        added: str | list[int] | None = None,
    ) -> PreparedPrompt:
        """As `prepare`, for a stream that goes on from another one's output; see `Preparer.fork`."""
        self._require_alive()
        return await self._preparer.fork(parent, output, params, chars=chars, added=added)

    async def prepare_embedding(self, prompt: str | list[int], pooling: Pooling = "last") -> PreparedPrompt:
        """As `prepare`, for one vector of the prompt, which comes with its last event."""
        self._require_alive()
        return await self._preparer.embedding(prompt, pooling)

    async def prepare_score(
        self, text: str | list[int], context: str | list[int] | None = None, *, logprobs: int | None = None
    ) -> PreparedPrompt:
        """As `prepare`, for the probability of `text` after `context`, which comes with the last event."""
        self._require_alive()
        return await self._preparer.score(text, context, logprobs=logprobs)

    def _require_alive(self) -> None:
        if not self._alive:
            raise DrainingError(ENGINE_LOST[1])  # nobody would ever read a request's outputs

    async def open(
        self,
        ids: Sequence[str],
        prepared: PreparedPrompt,
        *,
        sink: Sink,
        priority: int = 0,
        salt: str = "",
        tenant: str = "",
        credit: int | None = None,
        fork_of: str | None = None,
        first_branch: int = 0,
        queue_timeout_s: float | None = None,
    ) -> None:
        """Submit one prompt with one id per sample; from now on `sink` gets the events of all of them.

        Raises:
            StreamKVError: what `EngineClient.submit` raises; then no event comes.
        """
        self._require_alive()
        now = self._clock()
        for request_id in ids:
            if request_id in self._streams or request_id in self._stopped:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="id")
        for request_id in ids:
            # Before `submit`: its first output may come before `submit` returns.
            self._streams[request_id] = TextStream(request_id, prepared, self.tokenizer, sink, now)
        self.observer.opened(ids, prepared, salt, now)
        try:
            await self.client.submit(
                EngineRequest(
                    tuple(ids),
                    prepared.token_ids,
                    prepared.sampling,
                    priority=priority,
                    salt=salt,
                    tenant=tenant,
                    credit=credit,
                    pooling=prepared.pooling,
                    fork_of=fork_of,
                    first_branch=first_branch,
                    queue_timeout_s=queue_timeout_s,
                    inherited=prepared.inherited,
                )
            )
        except BaseException:
            for request_id in ids:
                self._streams.pop(request_id, None)
            self.observer.refused(ids)
            raise

    async def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request; its last event follows. Unknown and finished ids are ignored."""
        await self.client.cancel(request_id, reason)

    async def credit(self, request_id: str, limit: int) -> None:
        """The reader accepts so many output tokens; at the limit the request is parked."""
        await self.client.credit(request_id, limit)

    # -- out ------------------------------------------------------------------------------------------------------

    async def _consume(self) -> None:
        try:
            async for batch in self.client.steps():
                self._dispatch(batch)
        except Exception:
            log.exception("text_streams_failed")
        finally:
            self._alive = False
            self._lose_all()

    def _dispatch(self, batch: StepBatch) -> None:
        self.observer.batch(batch)
        by_sink: dict[Sink, list[StreamEvent]] = {}
        for output in batch.outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                if output.finish_reason is not None:
                    self._stopped.discard(output.id)
                continue
            events = by_sink.setdefault(stream.sink, [])
            if stream.take(output, batch.at, events):
                self._stopped.add(output.id)
                self._cancel_soon(output.id)
            if stream.finished:
                del self._streams[output.id]
                self._observe_end(events, batch.at)
        for sink, events in by_sink.items():
            if events:
                self._call(sink, events)

    def _call(self, sink: Sink, events: list[StreamEvent]) -> None:
        try:
            sink(events)
        except Exception:
            # One reader's mistake must not end the others' streams.
            log.exception("sink_failed")

    def _observe_end(self, events: list[StreamEvent], now: float) -> None:
        last = events[-1]
        assert isinstance(last, Finished)
        events[-1] = self.observer.finished(last, now)

    def _cancel_soon(self, request_id: str) -> None:
        task = asyncio.create_task(self.client.cancel(request_id, "stop"))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    def _lose_all(self) -> None:
        now = self._clock()
        for stream in list(self._streams.values()):
            events: list[StreamEvent] = []
            stream.lose(now, events)
            self._observe_end(events, now)
            self._call(stream.sink, events)
        self._streams.clear()

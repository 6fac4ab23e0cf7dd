"""The hub between an engine (token ids) and its readers (text): server, `Engine` and `LLM` all go through it.

It is the one consumer of the engine's steps. Per request it keeps an incremental detokenizer and the stop strings; per batch it
calls each reader's sink once, with all events of that batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import structlog

from streamkv.engine.api import EngineClient, EngineRequest, FinishReason, StepBatch, StepOutput
from streamkv.errors import ContextLengthError, DrainingError, InvalidRequestError
from streamkv.sampling_params import Sampling, SamplingParams, TokenLogprobs
from streamkv.text.detokenizer import IncrementalDetokenizer
from streamkv.text.events import Delta, Finished, Status, StreamEvent, Timings
from streamkv.text.stop import StopStrings
from streamkv.text.tokenizer import TextTokenizer

__all__ = ["Delta", "Finished", "PreparedPrompt", "Prompt", "Sink", "Status", "StreamEvent", "TextStreams", "Timings"]

Prompt = str | list[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages."""

_ENGINE_LOST: Final = ("engine_lost", "the engine stopped; send the request again later")

log = structlog.get_logger(__name__)


Sink = Callable[[list[StreamEvent]], None]
"""Called on the event loop, once per step batch, with the events of all requests that share the sink. Must not block."""


class PreparedPrompt(msgspec.Struct, frozen=True):
    """A checked request, ready to be submitted."""

    token_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    skip_special_tokens: bool
    hidden_stop_ids: frozenset[int]


class _Stream:
    """One request on its way out."""

    __slots__ = (
        "cached",
        "detokenizer",
        "finished",
        "first_at",
        "held",
        "held_logprobs",
        "hidden",
        "id",
        "offset",
        "prefill_at",
        "prompt_tokens",
        "sink",
        "stop",
        "submitted_at",
    )

    def __init__(self, request_id: str, prepared: PreparedPrompt, tokenizer: TextTokenizer, sink: Sink, now: float) -> None:
        self.id = request_id
        self.detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=prepared.skip_special_tokens)
        self.stop = StopStrings(prepared.stop)
        self.hidden = prepared.hidden_stop_ids
        self.sink = sink
        self.prompt_tokens = len(prepared.token_ids)
        self.offset = 0  # tokens delivered
        self.held: list[int] = []  # tokens received whose text is not certain yet
        self.held_logprobs: list[TokenLogprobs] = []
        self.cached = 0
        self.submitted_at = now
        self.prefill_at: float | None = None
        self.first_at: float | None = None
        self.finished = False

    def take(self, output: StepOutput, now: float, events: list[StreamEvent]) -> bool:
        """Append this output's events; True if a stop string completed and the engine must be told."""
        if output.state is not None:
            if output.state == "prefill" and self.prefill_at is None:
                self.prefill_at = now
                self.cached = output.cached or 0
            events.append(Status(self.id, output.state, output.cached))
        text = ""
        if output.token_ids:
            if self.first_at is None:
                self.first_at = now
            self.held.extend(output.token_ids)
            if output.logprobs is not None:
                self.held_logprobs.extend(output.logprobs)
            shown = output.token_ids
            if output.finish_reason == "stop" and shown[-1] in self.hidden:
                shown = shown[:-1]  # the token that ended the request is not part of its text
            text = self.stop.push(self.detokenizer.push(shown))
        if self.stop.stopped:
            self._deliver(text, events)
            self._end("stop", None, now, events)
            return output.finish_reason is None
        if output.finish_reason is not None:
            text += self.stop.push(self.detokenizer.finish())
            reason: FinishReason = "stop" if self.stop.stopped else output.finish_reason
            text += self.stop.finish()
            self._deliver(text, events)
            self._end(reason, output.error, now, events)
        elif text:
            self._deliver(text, events)
        return False

    def _deliver(self, text: str, events: list[StreamEvent]) -> None:
        if not self.held and not text:
            return
        count = len(self.held)
        logprobs = tuple(self.held_logprobs) if self.held_logprobs else None
        events.append(Delta(self.id, self.offset, count, text, tuple(self.held), logprobs))
        self.offset += count
        self.held.clear()
        self.held_logprobs.clear()

    def _end(self, reason: FinishReason, error: tuple[str, str] | None, now: float, events: list[StreamEvent]) -> None:
        self.finished = True
        prefill_at = self.prefill_at if self.prefill_at is not None else now
        first_at = self.first_at if self.first_at is not None else now
        timings = Timings(
            queue=prefill_at - self.submitted_at,
            prefill=first_at - prefill_at,
            ttft=first_at - self.submitted_at,
            decode=now - first_at,
        )
        events.append(Finished(self.id, reason, self.prompt_tokens, self.offset, self.cached, timings, error))

    def lose(self, now: float, events: list[StreamEvent]) -> None:
        """The engine is gone."""
        text = self.stop.push(self.detokenizer.finish())
        self._deliver(text + self.stop.finish(), events)
        self._end("error", _ENGINE_LOST, now, events)


class TextStreams:
    """Owns the consumer task and the tokenising threads. Use it as an async context manager."""

    def __init__(
        self, client: EngineClient, tokenizer: TextTokenizer, *, clock: Callable[[], float] = time.monotonic, threads: int = 1
    ) -> None:
        """Nothing runs before the block is entered.

        Args:
            clock: seconds; must be the engine's clock for timings to make sense.
            threads: threads that tokenise, so that the event loop never does.
        """
        self.client = client
        self.tokenizer = tokenizer
        self.info = client.describe()
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="streamkv-text")
        self._streams: dict[str, _Stream] = {}
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

    async def prepare(self, prompt: Prompt, params: SamplingParams, *, is_chat: bool) -> PreparedPrompt:
        """Tokenise off the event loop and check everything that can be checked before queueing.

        Raises:
            InvalidRequestError: empty prompt, token id out of range, unusable messages.
            ContextLengthError: prompt plus max_tokens exceed the context.
            DrainingError: the engine has stopped.
        """
        self._require_alive()
        for token_id in params.stop_token_ids:
            if token_id >= self.info.vocab_size:
                raise InvalidRequestError(f"stop_token_ids must be below {self.info.vocab_size}", param="stop_token_ids")
        if params.max_tokens is not None and params.max_tokens >= self.info.max_model_len:
            raise ContextLengthError(
                f"max_tokens is {params.max_tokens}; with a prompt that exceeds the context of {self.info.max_model_len}",
                param="max_tokens",
            )
        if not is_chat and isinstance(prompt, list):
            token_ids = self._checked(prompt)
        elif not is_chat and not isinstance(prompt, str):
            raise InvalidRequestError("a prompt is a string or a list of token ids", param="prompt")
        else:
            loop = asyncio.get_running_loop()
            encode: Callable[[Any], list[int]] = self.tokenizer.encode_chat if is_chat else self.tokenizer.encode
            token_ids = await loop.run_in_executor(self._pool, encode, prompt)
        if not token_ids:
            name = "messages" if is_chat else "prompt"
            raise InvalidRequestError(f"{name} is empty; send at least one token", param=name)
        room = self.info.max_model_len - len(token_ids)
        wanted = params.max_tokens
        if room < (wanted or 1):
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens and max_tokens is {wanted or 1}; together they exceed the context "
                f"of {self.info.max_model_len}",
                param="messages" if is_chat else "prompt",
            )
        eos = () if params.ignore_eos else self.info.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
        return PreparedPrompt(
            token_ids=token_ids,
            sampling=Sampling(
                max_tokens=wanted if wanted is not None else room,
                temperature=float(params.temperature),
                top_k=params.top_k,
                top_p=float(params.top_p),
                seed=params.seed if params.seed is not None else secrets.randbits(63),
                stop_token_ids=stop_ids,
                logprobs=params.logprobs,
            ),
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            hidden_stop_ids=frozenset(stop_ids) if params.skip_special_tokens else frozenset(params.stop_token_ids),
        )

    def _require_alive(self) -> None:
        if not self._alive:
            raise DrainingError(_ENGINE_LOST[1])  # nobody would ever read a request's outputs

    def _checked(self, token_ids: list[Any]) -> list[int]:
        if len(token_ids) > self.info.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens, more than the context of {self.info.max_model_len}", param="prompt"
            )
        bound = self.info.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < bound:
                raise InvalidRequestError(f"every token id must be an integer from 0 to {bound - 1}", param="prompt")
        return token_ids

    async def open(
        self,
        ids: Sequence[str],
        prepared: PreparedPrompt,
        *,
        sink: Sink,
        priority: int = 0,
        salt: str = "",
        credit: int | None = None,
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
            self._streams[request_id] = _Stream(request_id, prepared, self.tokenizer, sink, now)
        try:
            await self.client.submit(
                EngineRequest(tuple(ids), prepared.token_ids, prepared.sampling, priority=priority, salt=salt, credit=credit)
            )
        except BaseException:
            for request_id in ids:
                self._streams.pop(request_id, None)
            raise

    async def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request; its last event follows. Unknown and finished ids are ignored."""
        await self.client.cancel(request_id, reason)

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
        for sink, events in by_sink.items():
            if events:
                self._call(sink, events)

    def _call(self, sink: Sink, events: list[StreamEvent]) -> None:
        try:
            sink(events)
        except Exception:
            # One reader's mistake must not end the others' streams.
            log.exception("sink_failed")

    def _cancel_soon(self, request_id: str) -> None:
        task = asyncio.create_task(self.client.cancel(request_id, "stop"))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    def _lose_all(self) -> None:
        now = self._clock()
        for stream in list(self._streams.values()):
            events: list[StreamEvent] = []
            stream.lose(now, events)
            self._call(stream.sink, events)
        self._streams.clear()

"""The async Python API: many requests at once on one event loop. Needs neither the server nor aiohttp nor uvloop."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.errors import EngineError, InvalidRequestError, NumericalError, OutOfMemoryError, StreamKVError
from streamkv.outputs import CompletionOutput, EmbeddingOutput, RequestOutput, ScoreOutput
from streamkv.sampling_params import Pooling, SamplingParams
from streamkv.text.events import Delta, Finished, PromptRead, Status, StreamEvent
from streamkv.text.streams import PreparedPrompt, Prompt, TextStreams
from streamkv.text.tokenizer import load_tokenizer

__all__ = ["Engine", "PromptInput"]

PromptInput = str | list[int] | Mapping[str, Any]
"""A string, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}."""

_ERRORS: Final[dict[str, type[StreamKVError]]] = {kind.code: kind for kind in (NumericalError, OutOfMemoryError)}


class Engine:
    """The async API: many requests at once on one event loop.

    async with Engine(EngineConfig(model=path)) as engine:
        async for output in engine.generate("Hello", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        """Nothing is loaded before the block is entered."""
        self._config = config or EngineConfig()
        self._stack = AsyncExitStack()
        self._streams: TextStreams | None = None
        self._names = itertools.count()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(build_engine(self._config))
            tokenizer = load_tokenizer(self._config.model_path, max_tokens=client.describe().max_model_len)
            self._streams = await stack.enter_async_context(TextStreams(client, tokenizer))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._streams = None
        await self._stack.aclose()

    @property
    def streams(self) -> TextStreams:
        """The hub underneath: tokenizer, engine facts, raw events.

        Raises:
            EngineError: outside of the `async with` block.
        """
        if self._streams is None:
            raise EngineError("the engine is not running; use it inside `async with`")
        return self._streams

    async def generate(
        self, prompt: PromptInput, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Stream one prompt; every yield is the same object, grown. Leaving the loop early cancels the request.

        Raises:
            InvalidRequestError: the prompt or the parameters cannot be served.
            EngineError: the engine failed on this request.
        """
        text, given = _split(prompt)
        prepared = await self.streams.prepare(given, params or SamplingParams(), is_chat=False)
        async for output in self._follow(text, prepared, params or SamplingParams(), priority):
            yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation in the model's chat template; `tools` in OpenAI's form are what it may call."""
        prepared = await self.streams.prepare(messages, params or SamplingParams(), is_chat=True, tools=tools)
        async for output in self._follow(None, prepared, params or SamplingParams(), priority):
            yield output

    async def embed(self, prompt: PromptInput, *, pooling: Pooling = "last", normalize: bool = True) -> EmbeddingOutput:
        """One text as a vector: its last hidden states after the final norm, of the last token or their mean.

        Raises:
            InvalidRequestError: the prompt cannot be read, or this model gives no embeddings.
        """
        _, given = _split(prompt)
        prepared = await self.streams.prepare_embedding(given, pooling)  # type: ignore[arg-type]  # _split gives text or ids
        _, finished = await self._result(prepared)
        vector = finished.vector()
        length = math.hypot(*vector) if normalize else 0.0
        return EmbeddingOutput([value / length for value in vector] if length else vector, prepared.token_ids)

    async def score(self, text: PromptInput, *, context: PromptInput | None = None) -> ScoreOutput:
        """How probable the model holds a text, after `context` if there is one.

        Raises:
            InvalidRequestError: the texts cannot be read, or leave no token to score.
        """
        _, given = _split(text)
        before = None if context is None else _split(context)[1]
        prepared = await self.streams.prepare_score(given, before, logprobs=0)  # type: ignore[arg-type]  # text or ids
        events, finished = await self._result(prepared)
        first = prepared.score_from
        assert first is not None, "a score was asked for"
        assert finished.score is not None, "a score was asked for"
        entries = [entry for event in events for entry in event.logprobs.entries][first - 1 :]
        return ScoreOutput(finished.score.logprob, finished.score.perplexity, prepared.token_ids[first:], entries)

    async def _result(self, prepared: PreparedPrompt) -> tuple[list[PromptRead], Finished]:
        """Everything that a request without output tokens gives: what it read of its prompt, and its end."""
        events: list[StreamEvent] = []
        arrived = asyncio.Event()

        def sink(new: list[StreamEvent]) -> None:
            events.extend(new)
            if isinstance(new[-1], Finished):
                arrived.set()

        name = f"g{next(self._names)}"
        await self.streams.open([name], prepared, sink=sink)
        try:
            await arrived.wait()
        except BaseException:
            await self.streams.cancel(name)
            raise
        finished = events[-1]
        assert isinstance(finished, Finished)
        if finished.error is not None:
            raise _failure(finished.error)
        if finished.finish_reason == "cancelled":
            raise EngineError("the engine was closed before the request had ended")
        return [event for event in events if isinstance(event, PromptRead)], finished

    async def _follow(
        self, text: str | None, prepared: PreparedPrompt, params: SamplingParams, priority: int
    ) -> AsyncIterator[RequestOutput]:
        streams = self.streams
        name = f"g{next(self._names)}"
        ids = [f"{name}.{index}" for index in range(params.n)]
        result = RequestOutput(name, text, prepared.token_ids, [CompletionOutput(index) for index in range(params.n)])
        if prepared.reports_prompt:
            result.prompt_logprobs = [None]
        # A reader that is slow gets everything at once: events merge into `result`, nothing piles up.
        inbox: list[StreamEvent] = []
        arrived = asyncio.Event()

        def sink(events: list[StreamEvent]) -> None:
            inbox.extend(events)
            arrived.set()

        await streams.open(ids, prepared, sink=sink, priority=priority)
        try:
            while not result.finished:
                await arrived.wait()
                arrived.clear()
                events, inbox[:] = inbox[:], []
                changed = [_merge(result, event) for event in events]  # a list: `any` alone would stop at the first
                if any(changed):
                    yield result
        finally:
            for request_id, output in zip(ids, result.outputs, strict=True):
                if output.finish_reason is None:
                    await streams.cancel(request_id)


def _split(prompt: PromptInput) -> tuple[str | None, Prompt]:
    """(text if there is one, what to prepare)."""
    if isinstance(prompt, str):
        return prompt, prompt
    if isinstance(prompt, Mapping):
        ids = prompt.get("prompt_token_ids")
        if isinstance(ids, (list, tuple)):
            return prompt.get("prompt"), list(ids)
        if ids is not None:
            raise InvalidRequestError("prompt_token_ids must be a list of integers", param="prompt")
        if isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], prompt["prompt"]
        raise InvalidRequestError("a prompt object needs prompt_token_ids or prompt", param="prompt")
    if isinstance(prompt, list):
        return None, prompt
    raise InvalidRequestError("a prompt is a string, a list of token ids, or an object with prompt_token_ids", param="prompt")


def _merge(result: RequestOutput, event: StreamEvent) -> bool:
    """Take an event over into the result; True if a reader would want to know."""
    index = int(event.id.rpartition(".")[2])
    output = result.outputs[index]
    if isinstance(event, Status):
        if index == 0 and event.cached is not None:
            result.num_cached_tokens = event.cached
        return False
    if isinstance(event, PromptRead):
        assert result.prompt_logprobs is not None, "nobody asked for it"
        result.prompt_logprobs.extend(event.logprobs.entries)
        return False
    if isinstance(event, Delta):
        output.text += event.text
        output.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), *event.logprobs]
        return True
    assert isinstance(event, Finished)
    output.finish_reason = event.finish_reason
    if event.error is not None:
        raise _failure(event.error)
    return True


def _failure(error: tuple[str, str]) -> StreamKVError:
    code, message = error
    return _ERRORS.get(code, EngineError)(message)

"""The Python API: `LLM` for batches, `Engine` for streams. Neither needs the server, aiohttp or uvloop.

llm = LLM()                                                  # the model in the box
for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from tqdm import tqdm

from streamkv.engine.api import FinishReason
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.errors import EngineError, InvalidRequestError, NumericalError
from streamkv.sampling_params import SamplingParams, TokenLogprobs
from streamkv.text.events import Delta, Finished, Status, StreamEvent
from streamkv.text.streams import Prompt, TextStreams
from streamkv.text.tokenizer import load_tokenizer

__all__ = ["LLM", "CompletionOutput", "Engine", "PromptInput", "RequestOutput"]

T = TypeVar("T")

PromptInput = str | list[int] | Mapping[str, Any]
"""A string, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}."""

_ERRORS: Final = {"numerical_error": NumericalError}


@dataclass(slots=True)
class CompletionOutput:
    """One sample.

    Attributes:
        index: which of the `n` samples.
        text: without stop strings and, unless asked for, without special tokens.
        token_ids: everything that was sampled, the ending token included.
        logprobs: one per token, if asked for.
        finish_reason: `stop` or `length`; None while it runs.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        prompt: its text, if it was given as text.
        prompt_token_ids: what the model read.
        num_cached_tokens: prompt tokens of the first sample that came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """True once every sample has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


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
        async for output in self._follow(*_split(prompt), params or SamplingParams(), False, priority):
            yield output

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation in the model's chat template."""
        async for output in self._follow(None, messages, params or SamplingParams(), True, priority):
            yield output

    async def _follow(
        self, text: str | None, prompt: Prompt, params: SamplingParams, is_chat: bool, priority: int
    ) -> AsyncIterator[RequestOutput]:
        streams = self.streams
        prepared = await streams.prepare(prompt, params, is_chat=is_chat)
        name = f"g{next(self._names)}"
        ids = [f"{name}.{index}" for index in range(params.n)]
        result = RequestOutput(name, text, prepared.token_ids, [CompletionOutput(index) for index in range(params.n)])
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
    if isinstance(event, Delta):
        output.text += event.text
        output.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), *event.logprobs]
        return True
    assert isinstance(event, Finished)
    output.finish_reason = event.finish_reason
    if event.error is not None:
        code, message = event.error
        raise _ERRORS.get(code, EngineError)(message)
    return True


class LLM:
    """The offline API: give it prompts, get all outputs. Runs the same engine on an event loop in a thread of its own."""

    def __init__(
        self,
        model: str | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        """Load a model folder (None = the model in the box); `settings` are further fields of `EngineConfig`.

        Raises:
            ConfigError: a setting, the folder or the backend is at fault.
        """
        config = EngineConfig(
            model=model,
            backend=backend,
            device=device,
            dtype=dtype,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            **settings,
        )
        self._engine = Engine(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streamkv-llm", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._call(self._engine.__aenter__())
        except BaseException:
            self._stop_loop()
            raise

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for all prompts, batched; outputs in the order of the prompts.

        Args:
            prompts: one or several; a list of integers is one prompt of token ids.
            params: for all, or one per prompt.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; nothing of the batch is kept.
            EngineError: the engine failed on a request.
        """
        listed = _as_list(prompts)
        each = _per_prompt(params, len(listed))
        return self._call(self._generate_all(listed, each, use_tqdm))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
    ) -> RequestOutput:
        """Answer one conversation."""
        return self._call(_last(self._engine.chat(messages, params)))

    async def _generate_all(
        self, prompts: list[PromptInput], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        limit = asyncio.Semaphore(max(1, self._engine.streams.info.max_num_seqs * 4))
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=None if use_tqdm else True) as bar:
            tokens = 0

            async def one(prompt: PromptInput, own: SamplingParams) -> RequestOutput:
                nonlocal tokens
                async with limit:  # the queue is bounded, a batch is not
                    output = await _last(self._engine.generate(prompt, own))
                tokens += sum(len(sample.token_ids) for sample in output.outputs)
                bar.update()
                bar.set_postfix_str(f"{tokens} tokens", refresh=False)
                return output

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt, own)) for prompt, own in zip(prompts, params, strict=True)]
            return [task.result() for task in tasks]

    def close(self) -> None:
        """Free model and pool. Idempotent; also done when a `with` block is left."""
        if self._closed:
            return
        try:
            self._call(self._engine.__aexit__(None, None, None))
        finally:
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            coroutine.close()
            raise EngineError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(_unwrapped(coroutine), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    result: RequestOutput | None = None
    async for output in outputs:
        result = output
    assert result is not None, "a request ended without an output"
    return result


async def _unwrapped(coroutine: Coroutine[Any, Any, T]) -> T:
    """The first error itself rather than a group of one."""
    try:
        return await coroutine
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise InvalidRequestError("prompts is a prompt or a list of prompts", param="prompt")
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    return listed


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params]
    if not all(isinstance(item, SamplingParams) for item in each):
        raise InvalidRequestError("params must be SamplingParams, or a list of them", param="params")
    if len(each) != count:
        raise InvalidRequestError(
            f"there are {count} prompts and {len(each)} SamplingParams; give one, or one per prompt", param="params"
        )
    return each

"""The offline Python API: give it prompts, get all outputs. The async one is `streamkv.async_engine`.

llm = LLM()                                                  # the model in the box
for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

from streamkv.async_engine import Engine, PromptInput
from streamkv.engine.config import EngineConfig
from streamkv.errors import EngineError, InvalidRequestError
from streamkv.outputs import EmbeddingOutput, RequestOutput, ScoreOutput
from streamkv.sampling_params import Pooling, SamplingParams

__all__ = ["LLM"]

T = TypeVar("T")


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
        work = [partial(self._generate, prompt, own) for prompt, own in zip(listed, each, strict=True)]
        return self._call(self._batch(work, "generating", use_tqdm))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RequestOutput:
        """Answer one conversation; `tools` in OpenAI's form are what the model may call."""
        return self._call(_last(self._engine.chat(messages, params, tools=tools)))

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Turn texts into vectors, batched; outputs in the order of the prompts.

        Args:
            pooling: `last` = the last token's last hidden state, `mean` = the mean over all tokens.
            normalize: scale each vector to length 1.

        Raises:
            InvalidRequestError: a prompt cannot be read, or this model gives no embeddings.
        """
        work = [partial(self._engine.embed, prompt, pooling=pooling, normalize=normalize) for prompt in _as_list(prompts)]
        return self._call(self._batch(work, "embedding", use_tqdm))

    def score(
        self,
        texts: PromptInput | Sequence[PromptInput],
        *,
        context: PromptInput | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """How probable the model holds texts, batched; outputs in the order of the texts, each with its rank among them.

        Args:
            context: what comes before each of the texts; then they are choices, and only their own tokens count.

        Raises:
            InvalidRequestError: a text cannot be read, or has no token that could be scored.
        """
        work = [partial(self._engine.score, text, context=context) for text in _as_list(texts)]
        scores = self._call(self._batch(work, "scoring", use_tqdm))
        order = sorted(range(len(scores)), key=lambda index: -scores[index].logprob)
        ranks = {index: rank for rank, index in enumerate(order, 1)}
        return [replace(score, rank=ranks[index]) for index, score in enumerate(scores)]

    async def _generate(self, prompt: PromptInput, params: SamplingParams) -> RequestOutput:
        return await _last(self._engine.generate(prompt, params))

    async def _batch(self, work: Sequence[Callable[[], Awaitable[T]]], what: str, use_tqdm: bool) -> list[T]:
        """All results, in order; the first error ends the batch and cancels the rest."""
        limit = asyncio.Semaphore(max(1, self._engine.streams.info.max_num_seqs * 4))
        with tqdm(total=len(work), desc=what, unit="prompt", disable=None if use_tqdm else True) as bar:
            tokens = 0

            async def one(each: Callable[[], Awaitable[T]]) -> T:
                nonlocal tokens
                async with limit:  # the queue is bounded, a batch is not
                    output = await each()
                if isinstance(output, RequestOutput):
                    tokens += sum(len(sample.token_ids) for sample in output.outputs)
                    bar.set_postfix_str(f"{tokens} tokens", refresh=False)
                bar.update()
                return output

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(each)) for each in work]
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

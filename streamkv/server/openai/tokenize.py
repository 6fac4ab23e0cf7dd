"""`/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from streamkv.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from streamkv.protocol.body_structs import ChatMessage
from streamkv.server.openai.generation import Workload

__all__ = ["DetokenizeRequest", "DetokenizeResponse", "TokenizeRequest", "TokenizeResponse", "Tokenizing"]


T = TypeVar("T")


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text as `prompt`, or a conversation as `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: Any = None


class TokenizeResponse(msgspec.Struct, frozen=True):
    """Token ids; `token_strs` if they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """Their text, special tokens included."""

    prompt: str


class Tokenizing:
    """Off the event loop, one request at a time: generations must not wait for these."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._tokenizer = work.streams.tokenizer
        self._info = work.streams.info
        self._turn = asyncio.Semaphore(1)

    async def tokenize(self, given: TokenizeRequest) -> TokenizeResponse:
        """As a completion or a chat would be tokenised.

        Raises:
            InvalidRequestError: a field cannot be served, or the text cannot fit the context.
        """
        self._check(given)
        return await self._off_loop(partial(self._tokenize, given))

    def _check(self, given: TokenizeRequest) -> None:
        self._check_model(given.model)
        if (given.prompt is None) == (given.messages is None):
            raise InvalidRequestError("give prompt or messages, and not both", param="prompt")
        special = given.prompt is not None
        usual = {
            "add_special_tokens": special,
            "continue_final_message": False,
            "chat_template": None,
            "chat_template_kwargs": None,
        }
        for name, value in usual.items():
            if getattr(given, name) not in (None, value):
                raise InvalidRequestError(f"{name} is not served here with another value than usual; leave it out", param=name)

    def _tokenize(self, given: TokenizeRequest) -> TokenizeResponse:
        if given.prompt is not None:
            ids = self._tokenizer.encode(given.prompt)
        else:
            assert given.messages is not None
            ids = self._tokenizer.encode_chat(
                [message.plain() for message in given.messages],
                tools=given.tools,
                add_generation_prompt=given.add_generation_prompt is not False,
            )
        strings = [self._tokenizer.token_text(token_id) for token_id in ids] if given.return_token_strs else None
        return TokenizeResponse(len(ids), self._info.max_model_len, ids, strings)

    async def detokenize(self, given: DetokenizeRequest) -> DetokenizeResponse:
        """The text of all these tokens.

        Raises:
            InvalidRequestError: one of them is none of this model, or they are more than its context.
        """
        self._check_model(given.model)
        self._check_ids(given.tokens)
        return DetokenizeResponse(await self._off_loop(partial(self._tokenizer.decode, given.tokens, skip_special_tokens=False)))

    async def _off_loop(self, function: Callable[[], T]) -> T:
        await self._turn.acquire()
        task = self._work.spawn(asyncio.to_thread(function))
        # A client that goes away does not stop the thread: the turn is over when that is, or many could be made to run at once.
        task.add_done_callback(self._over)
        return await asyncio.shield(task)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._turn.release()
        if not task.cancelled():
            task.exception()  # there may be nobody left to hear of it

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._info.model:
            raise ModelNotFoundError(f"this server serves {self._info.model}", param="model")

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        info = self._info
        if len(token_ids) > info.max_model_len:
            raise ContextLengthError.of(info.max_model_len, f"these are {len(token_ids)}", param="tokens")
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < info.vocab_size:
            raise InvalidRequestError(f"every token id must be an integer from 0 to {info.vocab_size - 1}", param="tokens")

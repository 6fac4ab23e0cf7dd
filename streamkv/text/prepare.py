"""From what a caller asks for to what the engine is given: tokenised off the event loop, every bound checked before queueing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import msgspec

from streamkv.engine.api import EngineInfo, check_processors
from streamkv.errors import ContextLengthError, InvalidRequestError
from streamkv.sampling_params import POOLINGS, Pooling, Sampling, SamplingParams
from streamkv.text.detokenizer import whole_text
from streamkv.text.stream import PreparedPrompt
from streamkv.text.tokenizer import TextTokenizer

__all__ = ["Preparer", "Prompt"]

T = TypeVar("T")

Prompt = str | list[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages."""


class Preparer:
    """Knows the model's bounds and its tokenizer. Every method raises `InvalidRequestError` for what can never be served."""

    def __init__(self, info: EngineInfo, tokenizer: TextTokenizer, executor: Executor) -> None:
        """Texts are tokenised in `executor`."""
        self._info = info
        self._tokenizer = tokenizer
        self._executor = executor

    # -- generation -----------------------------------------------------------------------------------------------

    async def generation(
        self, prompt: Prompt, params: SamplingParams, *, is_chat: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> PreparedPrompt:
        """A prompt or a conversation to continue.

        Raises:
            InvalidRequestError: empty prompt, token id out of range, unusable messages.
            ContextLengthError: prompt plus max_tokens exceed the context.
        """
        self._check(params)
        name = "messages" if is_chat else "prompt"
        if is_chat:
            token_ids = await self._run(partial(self._tokenizer.encode_chat, tools=tools), prompt)
        else:
            token_ids = await self._token_ids(prompt, name)
        return await self._prepared(token_ids, params, name)

    async def fork(
        self,
        parent: PreparedPrompt,
        output: Sequence[int],
        params: SamplingParams,
        *,
        chars: int | None,
        added: str | list[int] | None,
    ) -> PreparedPrompt:
        """A stream that goes on from another one's output.

        Args:
            output: what it keeps of the parent's own tokens.
            chars: characters of the parent's text that its reader has of them; None = not known.
            added: text or token ids that follow, or None.
        """
        self._check(params)
        token_ids = [*parent.token_ids, *output]
        if added is not None:
            more = (
                await self._run(self._tokenizer.encode_more, added) if isinstance(added, str) else self._checked(added, "prompt")
            )
            return await self._prepared([*token_ids, *more], params, "prompt")
        prepared = await self._prepared(token_ids, params, "prompt")
        inherited = parent.inherited + len(output)
        return msgspec.structs.replace(prepared, inherited=inherited, inherited_chars=chars, echo="")

    def _check(self, params: SamplingParams) -> None:
        """What can be told of the parameters without tokenising."""
        info = self._info
        for param, largest in params.named_token_ids:
            if largest >= info.vocab_size:
                raise InvalidRequestError(f"{param} must be below {info.vocab_size}", param=param)
        check_processors(params.logits_processors, info)
        if params.max_tokens is not None and params.max_tokens >= info.max_model_len:
            raise ContextLengthError.of(
                info.max_model_len, f"a prompt and max_tokens of {params.max_tokens} are more", param="max_tokens"
            )

    async def _prepared(self, token_ids: list[int], params: SamplingParams, name: str) -> PreparedPrompt:
        max_tokens = self._max_tokens(token_ids, params, name)
        eos = () if params.ignore_eos else self._info.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
        of_prompt = params.prompt_logprobs
        if of_prompt is None and params.echo:
            of_prompt = params.logprobs
        hidden: tuple[int, ...] = stop_ids if params.skip_special_tokens else params.stop_token_ids
        return PreparedPrompt(
            token_ids=token_ids,
            sampling=Sampling(
                max_tokens=max_tokens,
                min_tokens=params.min_tokens,
                temperature=float(params.temperature),
                top_k=max(params.top_k, 0),
                top_p=float(params.top_p),
                min_p=float(params.min_p),
                typical_p=float(params.typical_p),
                repetition_penalty=float(params.repetition_penalty),
                presence_penalty=float(params.presence_penalty),
                frequency_penalty=float(params.frequency_penalty),
                logit_bias=tuple((token_id, float(bias)) for token_id, bias in params.logit_bias.items()),
                allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids)),
                bad_words=await self._bad_words(params),
                seed=params.seed if params.seed is not None else secrets.randbits(63),
                stop_token_ids=stop_ids,
                logprobs=params.logprobs,
                prompt_logprobs=of_prompt,
                processors=tuple(params.logits_processors.items()),
            ),
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            hidden_stop_ids=frozenset() if params.include_stop_str_in_output else frozenset(hidden),
            include_stop=params.include_stop_str_in_output,
            echo=await self._echo(token_ids, params) if params.echo else "",
            reports_prompt=of_prompt is not None,
        )

    def _max_tokens(self, token_ids: list[int], params: SamplingParams, name: str) -> int:
        """How many tokens to generate; the whole context if nothing is said."""
        room, wanted = self._info.max_model_len - len(token_ids), params.max_tokens
        least = max(1, params.min_tokens) if wanted is None else wanted
        if room < least:
            raise ContextLengthError.of(
                self._info.max_model_len,
                f"the prompt's {len(token_ids)} and {least} to generate are more; shorten the prompt or lower max_tokens",
                param=name,
            )
        return room if wanted is None else wanted

    async def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        banned: list[tuple[int, ...]] = [(token_id,) for token_id in params.bad_token_ids]
        if params.bad_words:
            banned += await self._run(self._sequences_of, params.bad_words)
        return tuple(dict.fromkeys(banned))

    def _sequences_of(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        return [sequence for word in words for sequence in self._tokenizer.bad_word_ids(word)]

    async def _echo(self, token_ids: list[int], params: SamplingParams) -> str:
        """The prompt's whole characters; one that it leaves unfinished comes with the output."""
        read = partial(whole_text, self._tokenizer, skip_special_tokens=params.skip_special_tokens)
        return await self._run(read, token_ids)

    # -- embeddings and scores ------------------------------------------------------------------------------------

    async def embedding(self, prompt: str | list[int], pooling: Pooling = "last") -> PreparedPrompt:
        """A prompt to be turned into one vector."""
        if pooling not in POOLINGS:
            raise InvalidRequestError(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
        if not self._info.embedding_dim:
            raise InvalidRequestError("this model gives no embeddings", param="model")
        token_ids = await self._token_ids(prompt, "input")
        self._fits(token_ids)
        return PreparedPrompt(token_ids=token_ids, sampling=Sampling(max_tokens=0), pooling=pooling)

    async def score(
        self, text: str | list[int], context: str | list[int] | None = None, *, logprobs: int | None = None
    ) -> PreparedPrompt:
        """A text whose probability is asked for, after `context` if there is one.

        Args:
            logprobs: None, or the tokens' own log-probabilities become events, with so many alternatives.
        """
        token_ids, first = await self._pair(text, context)
        self._fits(token_ids)
        if first >= len(token_ids):
            raise InvalidRequestError(
                "the text has no token that could be scored; the first token of a text without context has no probability",
                param="input",
            )
        sampling = Sampling(max_tokens=0, prompt_logprobs=logprobs or 0)
        return PreparedPrompt(token_ids=token_ids, sampling=sampling, score_from=first, reports_prompt=logprobs is not None)

    async def _pair(self, text: str | list[int], context: str | list[int] | None) -> tuple[list[int], int]:
        """(all token ids, position of the first that counts)."""
        if context is None or len(context) == 0:
            return await self._token_ids(text, "input"), 1
        if isinstance(text, str) and isinstance(context, str):
            # Tokenised together, as the model would read them; a space at the seam belongs to the word after it.
            kept = context.rstrip()
            together = await self._token_ids(context + text, "input")
            alone = await self._token_ids(kept, "prompt") if kept else []
            return together, max(1, len(alone))
        before, after = await self._token_ids(context, "prompt"), await self._token_ids(text, "input")
        return before + after, max(1, len(before))

    # -- shared ---------------------------------------------------------------------------------------------------

    async def _token_ids(self, prompt: Prompt, param: str) -> list[int]:
        """Token ids of a text, or the given ids, checked; at least one.

        Raises:
            InvalidRequestError: it is empty, or neither a string nor token ids of this model.
        """
        if isinstance(prompt, str):
            token_ids = await self._run(self._tokenizer.encode, prompt)
        elif isinstance(prompt, list):
            token_ids = self._checked(prompt, param)
        else:
            raise InvalidRequestError(f"{param} must be a string or a list of token ids", param=param)
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty; send at least one token", param=param)
        return token_ids

    def _checked(self, token_ids: list[Any], param: str) -> list[int]:
        if len(token_ids) > self._info.max_model_len:
            raise ContextLengthError.of(self._info.max_model_len, f"{param} has {len(token_ids)}", param=param)
        bound = self._info.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < bound:
                raise InvalidRequestError(f"every token id must be an integer from 0 to {bound - 1}", param=param)
        return token_ids

    def _fits(self, token_ids: list[int]) -> None:
        if len(token_ids) > self._info.max_model_len:
            raise ContextLengthError.of(self._info.max_model_len, f"the input has {len(token_ids)}", param="input")

    async def _run(self, function: Callable[[Any], T], argument: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, argument)

"""From a checked request to its answer, streamed or whole; the dialect says what it looks like."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec
import structlog
from aiohttp import web

from streamkv import __version__
from streamkv.engine.api import EngineInfo
from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.sampling_params import TokenLogprobs
from streamkv.server.guard import error_of
from streamkv.server.openai.answer import Answer, AnswerContext
from streamkv.server.openai.generation import Generation, Piece, Workload
from streamkv.server.openai.names import TokenNames
from streamkv.server.openai.prompts import prepare_each
from streamkv.server.openai.requests import GenerationRequest
from streamkv.server.openai.shapes import Head
from streamkv.server.openai.sse import DONE, EventStream, Timing, abort, event
from streamkv.server.report import check_report
from streamkv.server.request_id import about
from streamkv.text.events import Finished

__all__ = ["Generating", "json_response"]

MAX_ANSWER: Final = 16 * 2**20
"""Bytes of one whole answer, each log-probability counted as 24, that may wait for its end."""
_MANY: Final = 256
"""Tokens whose log-probabilities are written in a millisecond or two, with 20 alternatives each."""

log = structlog.get_logger(__name__)
_encode = msgspec.json.Encoder().encode


def json_response(body: msgspec.Struct) -> web.Response:
    """A whole answer."""
    return web.Response(body=_encode(body), content_type="application/json")


class Generating:
    """Serves both completion APIs."""

    def __init__(self, work: Workload, timing: Timing, max_waiting: int) -> None:
        """Take over what the door has.

        Args:
            max_waiting: bytes of text that may wait for a client that reads slowly.
        """
        self._work = work
        self._timing = timing
        self._max_waiting = max_waiting
        self._names = TokenNames(work.streams.tokenizer)
        self._fingerprint = _fingerprint(work.streams.info)

    async def answer(
        self, request: web.Request, wish: GenerationRequest, ident: str, dialect: Callable[[AnswerContext], Answer]
    ) -> web.StreamResponse:
        """Generate. Until the first byte is out, errors are raised; later they are events.

        Args:
            ident: the answer's id, unique.

        Raises:
            StreamKVError: it cannot be served.
        """
        names, body, streams = about(request), wish.body, self._work.streams
        prepare = partial(streams.prepare, params=body.params, is_chat=body.is_chat, tools=body.tools)
        prompts = await prepare_each("prompt", wish.prompts, prepare)
        # Each choice of a completion shows its prompt's log-probabilities.
        check_report(*prompts, times=1 if body.is_chat else body.params.n)
        limit = self._max_waiting if wish.stream else MAX_ANSWER

        def overflowed(generation: Generation) -> None:
            if wish.stream:
                abort(request, "slow_consumer")
            else:
                generation.fail(InvalidRequestError("the answer is too large to be sent whole; stream it, or ask for less"))

        samples = body.params.n
        with self._work.generation(ident, prompts, samples, limit=limit, overflowed=overflowed) as generation:
            head = Head(id=ident, created=int(time.time()), model=streams.info.model, system_fingerprint=self._fingerprint)
            context = AnswerContext(head, body.params, prompts, self._names, wish.usage, generation.prompt_logprobs, wish.tier)
            await generation.open(wish.principal, priority=wish.priority, salt=wish.salt)
            tokens = sum(len(prepared.token_ids) for prepared in prompts)
            log.info("request_opened", **names, id=ident, num_prompts=len(prompts), samples=samples, prompt_tokens=tokens)
            if wish.stream:
                return await self._stream(request, generation, dialect(context), len(prompts) * samples)
            await generation.ended.wait()
            pieces = list(generation.take())
            if generation.failure is not None:
                raise generation.failure
            for piece in pieces:
                _log_end(names, ident, piece.finished)
            return await _whole(dialect(context), pieces, generation.prompt_logprobs)

    async def _stream(self, request: web.Request, generation: Generation, answer: Answer, running: int) -> web.StreamResponse:
        names = about(request)
        events = EventStream(request, generation.arrived, self._timing)
        try:
            await events.start()
            while running:
                await generation.arrived.wait()
                data = []
                for piece in generation.take():
                    data += [event(_encode(chunk)) for chunk in answer.chunks(piece)]
                    if piece.finished is not None:
                        running -= 1
                        _log_end(names, piece.finished.id, piece.finished)
                if running:
                    await events.send(b"".join(data))
            last = answer.last_chunk()
            await events.finish(b"".join((*data, event(_encode(last)) if last is not None else b"", DONE)))
        except StreamKVError as error:
            log.info("request_failed", **names, code=error.code)
            await self._fail(request, events, error)
        except TimeoutError:
            abort(request, "slow_consumer")
        except ConnectionError:
            pass  # the generation ends with its block
        except Exception:
            log.exception("request_failed", **names)
            await self._fail(request, events, StreamKVError("the server failed on this request; its log says why"))
        finally:
            events.close()
        return events.response

    async def _fail(self, request: web.Request, events: EventStream, error: StreamKVError) -> None:
        """Say it in an event: the status has been sent."""
        body = error_of(error).body
        assert isinstance(body, bytes)
        try:
            await events.finish(event(body) + DONE)
        except TimeoutError:
            abort(request, "slow_consumer")
        except ConnectionError:
            pass


async def _whole(answer: Answer, pieces: list[Piece], of_prompts: Sequence[Sequence[TokenLogprobs]]) -> web.Response:
    """Thousands of log-probabilities are written in a thread: others must not wait for them."""
    if sum(len(piece.logprobs) for piece in pieces) + sum(map(len, of_prompts)) < _MANY:
        return json_response(answer.whole(pieces))
    return await asyncio.to_thread(lambda: json_response(answer.whole(pieces)))


def _fingerprint(info: EngineInfo) -> str:
    """What must be the same for equal seeds to give equal texts."""
    parts = (__version__, info.model, info.fingerprint, info.backend, info.dtype)
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def _log_end(names: dict[str, str], ident: str, finished: Finished | None) -> None:
    if finished is not None:
        log.info(
            "request_finished",
            **names,
            id=ident,
            reason=finished.finish_reason,
            prompt=finished.prompt_tokens,
            completion=finished.completion_tokens,
            cached=finished.cached_tokens,
            ttft=round(finished.timings.ttft, 4),
        )

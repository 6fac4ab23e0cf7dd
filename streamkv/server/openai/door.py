"""The OpenAI dialect's routes, and their share of the server's life cycle."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec
import structlog
from aiohttp import web

from streamkv.errors import DrainingError, OverloadedError, StreamKVError
from streamkv.server.admission import Admission
from streamkv.server.config import ServerConfig
from streamkv.server.guard import error_of
from streamkv.server.openai.answer import Answer, AnswerContext
from streamkv.server.openai.chat import ChatAnswer
from streamkv.server.openai.completions import CompletionAnswer
from streamkv.server.openai.embeddings import embed
from streamkv.server.openai.generate import Generating, json_response
from streamkv.server.openai.generation import Workload
from streamkv.server.openai.models import model, models
from streamkv.server.openai.openapi import document
from streamkv.server.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    check_generation,
    read_body,
)
from streamkv.server.openai.sse import Timing, send_whole
from streamkv.server.openai.tokenize import DetokenizeRequest, TokenizeRequest, Tokenizing
from streamkv.server.principal import principal_of
from streamkv.server.request_id import about
from streamkv.server.routes import Access, Handler, Route
from streamkv.text.streams import TextStreams

__all__ = ["OpenAIDoor"]

log = structlog.get_logger(__name__)


class OpenAIDoor:
    """Everything under `/v1` that is plain HTTP, `/tokenize`, `/detokenize` and `/openapi.json`."""

    def __init__(
        self,
        streams: TextStreams,
        config: ServerConfig,
        admission: Admission,
        moved: Callable[[], None],
        *,
        timing: Timing | None = None,
    ) -> None:
        """`moved` is called whenever nothing may be left in progress."""
        self._info = streams.info
        self._config = config
        self._moved = moved
        self._timing = timing or Timing.of(config)
        self.work = Workload(streams, admission, moved)
        self._generating = Generating(self.work, self._timing, config.limits.outbound)
        self._tokenizing = Tokenizing(self.work)
        self._created = int(time.time())
        self._active = 0
        self._draining = False

    def routes(self) -> list[Route]:
        """All of them need a key."""
        posts: dict[str, Handler] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/v1/embeddings": self._embeddings,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        gets: dict[str, Handler] = {
            "/v1/models": self._models,
            "/v1/models/{model:.+}": self._model,
            "/openapi.json": self._openapi,
        }
        return [Route("POST", path, self._counted(handler), Access.CLIENT) for path, handler in posts.items()] + [
            Route("GET", path, self._counted(handler), Access.CLIENT) for path, handler in gets.items()
        ]

    def _counted(self, handler: Handler) -> Handler:
        """Counts as work until the last byte is on its way."""

        async def answer(request: web.Request) -> web.StreamResponse:
            self._active += 1
            try:
                response = await self._answer(request, handler)
                if isinstance(response, web.Response) and not response.prepared:
                    await send_whole(request, response, self._timing.send_timeout_s)
            finally:
                self._active -= 1
                self._moved()
            return response

        return answer

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.method == "POST":
                self._admit()
            return await handler(request)
        except StreamKVError as error:
            return self._refusal(error)
        except ConnectionError:
            raise
        except Exception:
            log.exception("handler_failed", **about(request))
            return self._refusal(StreamKVError("the server failed on this request; its log says why"))

    def _refusal(self, error: StreamKVError) -> web.Response:
        response = error_of(error)
        if self._draining:
            response.force_close()  # its next request belongs to another server
        return response

    def _admit(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down; send the request to another one")
        if self._active > self._config.max_connections:
            raise OverloadedError("too many requests at once; try again later", retry_after_s=1.0)

    # -- routes ---------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        given = await read_body(request, ChatCompletionRequest)
        return await self._generate(request, given, f"chatcmpl-{secrets.token_hex(12)}", ChatAnswer)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        given = await read_body(request, CompletionRequest)
        return await self._generate(request, given, f"cmpl-{secrets.token_hex(12)}", CompletionAnswer)

    async def _generate(
        self,
        request: web.Request,
        given: ChatCompletionRequest | CompletionRequest,
        ident: str,
        dialect: Callable[[AnswerContext], Answer],
    ) -> web.StreamResponse:
        wish = check_generation(request, given, self._info)
        return await self._generating.answer(request, wish, ident, dialect)

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        given = await read_body(request, EmbeddingRequest)
        return json_response(await embed(self.work, f"embd-{secrets.token_hex(12)}", given, principal_of(request)))

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        return json_response(await self._tokenizing.tokenize(await read_body(request, TokenizeRequest)))

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        return json_response(await self._tokenizing.detokenize(await read_body(request, DetokenizeRequest)))

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        return json_response(models(self._info, self._created))

    async def _model(self, request: web.Request) -> web.StreamResponse:
        return json_response(model(self._info, self._created, request.match_info["model"]))

    async def _openapi(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(document(needs_key=self._config.has_keys)), content_type="application/json")

    # -- shutdown -------------------------------------------------------------------------------------------------

    def drain(self, deadline_s: float, reason: str) -> None:
        """New requests are refused; what runs goes on."""
        del deadline_s, reason  # HTTP has no way to announce it
        self._draining = True

    @property
    def idle(self) -> bool:
        """True if no request is being answered."""
        return self._active == 0 and self.work.idle

    def close(self, reason: str) -> None:
        """End what still runs, with an error that says so."""
        self.work.close(DrainingError(f"the answer is not complete: {reason}"))

    @property
    def closed(self) -> bool:
        """True once nothing of it is left, in the engine neither."""
        return self.idle

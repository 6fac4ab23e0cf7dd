"""One WebSocket: a reader that feeds the session, and the one writer that empties it. Every send is bounded in time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
import structlog
from aiohttp import WSMsgType, web

from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.protocol.bodies import ParsedBody, ParsedEmbedding
from streamkv.protocol.messages import Codec
from streamkv.protocol.session import Action, CancelStream, Close, ConnectionState, OpenStreams, Session
from streamkv.server.config import ServerConfig
from streamkv.text.events import Finished, StreamEvent
from streamkv.text.streams import PreparedPrompt, TextStreams

__all__ = ["Connection"]

_CLOSE_TIMEOUT_S: Final = 3.0
_MAX_REPORTED: Final = 32_768
"""Most log-probabilities of prompt tokens that one request can ask for: under a megabyte of frames that may wait."""

log = structlog.get_logger(__name__)


class Connection:
    """Carries out what the session wishes. Lives as long as the handler that awaits `run`."""

    def __init__(
        self,
        name: str,
        socket: web.WebSocketResponse,
        request: web.Request,
        codec: Codec,
        session: Session,
        streams: TextStreams,
        config: ServerConfig,
        on_idle: Callable[[], None],
    ) -> None:
        """Take over a prepared socket; ``on_idle`` is called whenever nothing is left to send and no stream is alive."""
        self.name = name
        self.session = session
        self._socket = socket
        self._request = request
        self._codec = codec
        self._streams = streams
        self._config = config
        self._on_idle = on_idle
        self._wake = asyncio.Event()
        self._room = asyncio.Event()  # the writer has sent something, or has ended
        self._aborted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine_ids: dict[str, str] = {}  # stream id -> request id in the engine
        self._stream_ids: dict[str, str] = {}
        self._names = itertools.count()
        self._closing: Close | None = None
        self._log = log.bind(connection=name)

    async def run(self) -> None:
        """Until either side closes; afterwards nothing of it is left in the engine."""
        writer = asyncio.create_task(self._write(), name=f"{self.name}-writer")
        hello = asyncio.get_running_loop().call_later(self._config.limits.hello_s, self._hello_late)
        try:
            await self._read(writer)
        finally:
            hello.cancel()
            self._perform(list(self.session.lost()))
            if self._closing is None:
                writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            while self._tasks:  # one that opens a stream may leave one that cancels it
                await asyncio.gather(*self._tasks, return_exceptions=True)
            self._log.info("disconnected", code=self._socket.close_code)

    async def _read(self, writer: asyncio.Task[None]) -> None:
        async for message in self._socket:
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                break
            data: bytes = message.data
            self._perform(self.session.receive(data, is_text=message.type is WSMsgType.TEXT, now=time.monotonic()))
            self._wake.set()
            while self.session.crowded and not writer.done():
                # Who does not take the answers cannot ask on: TCP tells it so, and the writer's time limit ends it.
                self._room.clear()
                await self._room.wait()
            if self._closing is not None or writer.done():
                break

    def drain(self, deadline_s: float, reason: str) -> None:
        """Announce that the server is going away."""
        self._perform(self.session.drain(int(deadline_s * 1000), reason))
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """Send what is pending, then close; the reader ends with the peer's answer or a time limit."""
        if self._closing is None:
            self._closing = Close(code, reason)
            self._wake.set()

    @property
    def idle(self) -> bool:
        """True if no stream is alive and everything has been sent."""
        return self.session.num_streams == 0

    # -- wishes of the session ------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case OpenStreams():
                    self._spawn(self._open(action))
                case CancelStream():
                    self._cancel(action.id)
                case Close():
                    self.close(action.code, action.reason)

    async def _open(self, wish: OpenStreams) -> None:
        """One prompt for all ids, or one input for each."""
        body, streams = wish.body, self._streams
        if isinstance(body, ParsedBody):
            preparing = streams.prepare(body.prompt, body.params, is_chat=body.is_chat, tools=body.tools)
            await self._open_one(wish.ids, preparing, wish.priority)
            return
        for stream_id, given in zip(wish.ids, body.inputs, strict=True):
            if isinstance(body, ParsedEmbedding):
                preparing = streams.prepare_embedding(given, body.pooling)
            else:
                preparing = streams.prepare_score(given, body.prompt, logprobs=body.logprobs)
            await self._open_one((stream_id,), preparing, wish.priority)

    async def _open_one(self, ids: tuple[str, ...], preparing: Awaitable[PreparedPrompt], priority: int) -> None:
        """Tokenise, check, submit; the answer goes through the session."""
        rid = f"{self.name}-{next(self._names)}"
        engine_ids = {stream_id: f"{rid}.{index}" for index, stream_id in enumerate(ids)}
        try:
            prepared = await preparing
            _check_report(prepared)
            if self.session.closed:
                return
            self._stream_ids |= {engine_id: stream_id for stream_id, engine_id in engine_ids.items()}
            self._engine_ids |= engine_ids
            await self._streams.open(list(engine_ids.values()), prepared, sink=self._sink, priority=priority)
        except StreamKVError as error:
            self._forget(engine_ids)
            self._log.info("stream_refused", rid=rid, code=error.code, param=error.param)
            self._perform(self.session.refused(ids, error))
        except Exception:
            self._forget(engine_ids)
            self._log.exception("stream_failed", rid=rid)
            self._perform(self.session.refused(ids, StreamKVError("the server failed on this request; its log says why")))
        else:
            self._log.info("stream_opened", rid=rid, streams=len(ids), prompt_tokens=len(prepared.token_ids))
            if self.session.closed:
                self._cancel_all()
            else:
                self._perform(self.session.opened(ids, rid, len(prepared.token_ids)))
        self._wake.set()

    def _forget(self, engine_ids: dict[str, str]) -> None:
        for stream_id, engine_id in engine_ids.items():
            self._engine_ids.pop(stream_id, None)
            self._stream_ids.pop(engine_id, None)

    def _cancel(self, stream_id: str) -> None:
        engine_id = self._engine_ids.get(stream_id)
        if engine_id is not None:
            self._spawn(self._streams.cancel(engine_id))

    def _cancel_all(self) -> None:
        for engine_id in list(self._engine_ids.values()):
            self._spawn(self._streams.cancel(engine_id))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sink(self, events: list[StreamEvent]) -> None:
        """Events of one step batch; runs on the loop, must not block."""
        renamed: list[StreamEvent] = []
        for event in events:
            stream_id = self._stream_ids.get(event.id)
            if stream_id is None:
                continue
            if isinstance(event, Finished):
                self._forget({stream_id: event.id})
                self._log.info(
                    "stream_finished",
                    rid=event.id,
                    reason=event.finish_reason,
                    prompt=event.prompt_tokens,
                    completion=event.completion_tokens,
                    cached=event.cached_tokens,
                    ttft=round(event.timings.ttft, 4),
                )
            renamed.append(msgspec.structs.replace(event, id=stream_id))  # under the client's own name
        if renamed and not self.session.closed and not self._aborted:
            self._perform(self.session.events(renamed, time.monotonic()))
            if self.session.too_slow:
                self._abort("slow_consumer")
            self._wake.set()

    # -- the writer -----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Send what is due until told to close."""
        encode = self._codec.encode
        kind = WSMsgType.TEXT if self._codec.text else WSMsgType.BINARY
        transport = self._request.transport
        try:
            while True:
                busy = transport is not None and transport.get_write_buffer_size() > 0
                message = self.session.next_message(time.monotonic(), busy=busy)
                if message is not None:
                    async with asyncio.timeout(self._config.send_timeout_s):
                        await self._socket.send_frame(encode(message), kind)
                    self._room.set()
                    continue
                if self._closing is not None:
                    break
                if self.idle:
                    self._on_idle()
                self._wake.clear()
                wait = self.session.next_due(time.monotonic(), busy=busy)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
            await self._close_socket(self._closing)
        except TimeoutError:
            # aiohttp's heartbeat closes politely and waits for a flush that never comes; only abort frees the handler.
            self._abort("slow_consumer")
        except ConnectionError:
            self._abort("connection_lost")
        except Exception:
            self._log.exception("writer_failed")
            self._abort("writer_failed")
        finally:
            self._room.set()

    async def _close_socket(self, closing: Close) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._socket.close(code=closing.code, message=closing.reason.encode()[:123])
        except TimeoutError:
            self._abort("close_timeout")

    def _abort(self, reason: str) -> None:
        self._aborted = True
        transport = self._request.transport
        if transport is not None:
            self._log.warning("aborted", reason=reason)
            transport.abort()

    def _hello_late(self) -> None:
        if self.session.state is ConnectionState.AWAIT_HELLO:
            self.close(4408, "hello_timeout: send hello first")


def _check_report(prepared: PreparedPrompt) -> None:
    """What is said of a prompt must not fill the memory when the client is slow to read it.

    Raises:
        InvalidRequestError: too many log-probabilities of prompt tokens.
    """
    top = prepared.sampling.prompt_logprobs
    if top is not None and prepared.reports_prompt and len(prepared.token_ids) * (1 + top) > _MAX_REPORTED:
        raise InvalidRequestError(
            f"{len(prepared.token_ids)} prompt tokens with {top} alternatives each are more than {_MAX_REPORTED} "
            "log-probabilities; ask for fewer",
            param="prompt_logprobs",
        )

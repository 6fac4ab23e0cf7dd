"""Async Python client: many streams on one WebSocket.

    async with connect("ws://127.0.0.1:8000/v1/stream") as client:
        async for delta in client.chat([{"role": "user", "content": "Hello"}], max_tokens=64):
            print(delta.x, end="", flush=True)

Leaving an `async with client.chat(...) as stream` block before the end cancels the stream on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Literal, Self

import aiohttp
import msgspec

from streamkv.errors import InvalidRequestError, StreamKVError
from streamkv.protocol import messages as m
from streamkv.sampling_params import MAX_N

__all__ = ["Client", "ClientConnectionError", "RemoteError", "Stream", "connect"]

_ENVELOPE_BYTES: Final = 128
"""More than a `create` has around its body, and than each id adds."""

_DATA: Final = (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)
_CODECS: Final = {"json": "streamkv.v1.json", "msgpack": "streamkv.v1.msgpack"}


class ClientConnectionError(StreamKVError):
    """The server cannot be reached, refused the connection, or went away."""

    code = "connection"
    retryable = True


class RemoteError(StreamKVError):
    """The server ended a stream with an error.

    Attributes:
        remote_code: code of the wire protocol, such as `invalid_request`.
        can_retry: the server says that the same request may succeed later.
    """

    def __init__(self, error: m.Error) -> None:
        super().__init__(error.message, param=error.param)
        self.remote_code = error.code
        self.can_retry = error.retryable


class Stream:
    """One stream: an async iterator of deltas, and its text so far.

    Attributes:
        id: its name on this connection.
        text: all deltas so far, joined.
        done: the last frame, once it has come: finish reason, usage, timings, and the embedding or score asked for.
        prompt_logprobs: of the prompt tokens from the second on, if asked for: {"chosen", "rank", "top"}.
    """

    def __init__(self, client: Client, stream_id: str) -> None:
        self.id = stream_id
        self.text = ""
        self.num_tokens = 0
        self.cached = 0
        self.done: m.Done | None = None
        self.prompt_logprobs: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._client = client
        self._inbox: deque[m.Delta] = deque()
        self._changed = asyncio.Event()
        self._created: asyncio.Task[None] | None = None  # sends the `create`; shared by the samples of one prompt

    def __aiter__(self) -> AsyncIterator[m.Delta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[m.Delta]:
        """Deltas as they come; those that came while nobody looked come at once.

        Raises:
            RemoteError: the stream ended with an error.
            ClientConnectionError: the connection is gone.
        """
        try:
            while True:
                while self._inbox:
                    yield self._inbox.popleft()
                if self.done is not None:
                    return
                if self._error is not None:
                    raise self._error
                self._changed.clear()
                await self._changed.wait()
        finally:
            await self.cancel()

    async def result(self) -> str:
        """The whole text, once the stream has ended. Raises what iterating raises."""
        async for _ in self:
            pass
        return self.text

    async def cancel(self) -> None:
        """Ask the server to end the stream; nothing happens if it has ended."""
        if self._created is not None:
            await asyncio.wait({self._created})  # a cancel that overtakes its create would be ignored
        if self.ended:
            return
        await self._client._send(m.Cancel(self.id))  # noqa: SLF001  # a stream is part of its client

    @property
    def ended(self) -> bool:
        """True once the last frame has come or the connection is gone."""
        return self.done is not None or self._error is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.cancel()

    def _receive(self, message: m.Prompt | m.Delta | m.Done | m.Status | m.Error) -> None:
        match message:
            case m.Delta():
                if message.o != self.num_tokens:
                    self._error = ClientConnectionError(f"stream {self.id}: token {self.num_tokens} expected, {message.o} came")
                self.text += message.x
                self.num_tokens += message.n
                self._inbox.append(message)
            case m.Prompt():
                self.prompt_logprobs.extend(message.lp)
            case m.Status():
                if message.cached is not None:
                    self.cached = message.cached
            case m.Done():
                self.done = message
            case m.Error():
                self._error = RemoteError(message)
        self._changed.set()

    def _lose(self, error: Exception) -> None:
        if not self.ended:
            self._error = error
        self._changed.set()


class Client:
    """One connection. Made by `connect`.

    Attributes:
        welcome: what the server said of itself and its limits.
        draining: the server has announced that it is going away.
        notices: errors that belong to no stream.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, codec: m.Codec) -> None:
        self._socket = socket
        self._codec = codec
        self._streams: dict[str, Stream] = {}
        self._names = itertools.count()
        self._pongs: dict[float, asyncio.Future[float]] = {}
        self._lost: ClientConnectionError | None = None
        self.welcome: m.Welcome | None = None
        self.draining: m.Drain | None = None
        self.notices: list[m.Error] = []

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Stream:
        """Answer a conversation.

        Args:
            sampling: fields of OpenAI's body and of docs/protocol.md: max_tokens, temperature, stop, tools, ... and `priority`.
        """
        return self._create("chat", {"messages": list(messages)}, 1, sampling)[0]

    def complete(self, prompt: str | list[int], **sampling: Any) -> Stream:
        """Continue a text, or token ids."""
        return self._create("completions", {"prompt": prompt}, 1, sampling)[0]

    def samples(self, n: int, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> list[Stream]:
        """`n` answers to one conversation that share its KV blocks."""
        return self._create("chat", {"messages": list(messages)}, n, sampling)

    async def embed(
        self, inputs: str | Sequence[str | list[int]], *, pooling: Literal["last", "mean"] = "last"
    ) -> list[list[float]]:
        """Texts as vectors, as the model gives them (not scaled); in the order of the inputs.

        Raises:
            RemoteError: an input cannot be read, or the model gives no embeddings.
        """
        ended = await self._compute("embeddings", {"pooling": pooling}, inputs)
        return [done.embedding or [] for done in ended]

    async def score(self, inputs: str | Sequence[str | list[int]], *, prompt: str | list[int] | None = None) -> list[m.Score]:
        """How probable the model holds texts after `prompt`, in the order of the inputs.

        Raises:
            RemoteError: an input cannot be read, or has no token that could be scored.
        """
        ended = await self._compute("score", {} if prompt is None else {"prompt": prompt}, inputs)
        return [done.score for done in ended if done.score is not None]

    async def _compute(self, api: str, body: dict[str, Any], inputs: str | Sequence[str | list[int]]) -> list[m.Done]:
        """One stream per input; their last frames."""
        listed = [inputs] if isinstance(inputs, str) else list(inputs)
        streams: list[Stream] = []
        for first in range(0, len(listed), MAX_N):
            part = listed[first : first + MAX_N]
            streams += self._create(api, body | {"input": part}, len(part), {})
        await asyncio.gather(*(stream.result() for stream in streams))
        return [stream.done for stream in streams if stream.done is not None]

    def _create(self, api: str, body: dict[str, Any], n: int, sampling: dict[str, Any]) -> list[Stream]:
        if not 1 <= n <= MAX_N:
            raise InvalidRequestError(f"n must be an integer from 1 to {MAX_N}", param="n")
        priority = sampling.pop("priority", 0)
        ids = [f"s{next(self._names)}" for _ in range(n)]
        encoded = self._codec.encode(body | sampling)
        message = m.Create(api, msgspec.Raw(encoded), ids=ids, priority=priority)
        limit = self.welcome.limits.frame if self.welcome is not None else len(encoded)
        if len(encoded) + _ENVELOPE_BYTES * (1 + n) > limit:
            # The server would close the connection, and with it every other stream.
            raise InvalidRequestError(f"the request has {len(encoded)} bytes; the server takes frames of up to {limit}")
        streams = [Stream(self, stream_id) for stream_id in ids]
        if self._lost is not None:
            for stream in streams:
                stream._lose(self._lost)  # noqa: SLF001  # as above
            return streams
        self._streams |= {stream.id: stream for stream in streams}
        sending = asyncio.get_running_loop().create_task(self._send(message))
        for stream in streams:
            stream._created = sending  # noqa: SLF001  # as above
        return streams

    async def ping(self) -> float:
        """The server's wall clock, in seconds; shows that it answers.

        Raises:
            ClientConnectionError: the connection is gone.
        """
        if self._lost is not None:
            raise self._lost
        stamp = float(next(self._names))
        pong: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._pongs[stamp] = pong
        try:
            await self._send(m.Ping(stamp))
            return await pong
        finally:
            self._pongs.pop(stamp, None)

    async def _send(self, message: m.ClientMessage) -> None:
        # A connection that is gone is the reader's to report.
        data = self._codec.encode(message)
        with contextlib.suppress(ConnectionError):
            await self._socket.send_frame(data, aiohttp.WSMsgType.TEXT if self._codec.text else aiohttp.WSMsgType.BINARY)

    async def _read(self) -> None:
        """Route frames to their streams until the connection ends."""
        reason = "the connection was closed"
        try:
            while (frame := await self._socket.receive()).type in _DATA:
                self._receive(_decoded(self._codec, frame))
            # `close_code` says 1006 if our answer came too late; the frame itself says why.
            code = frame.data if frame.type is aiohttp.WSMsgType.CLOSE else self._socket.close_code
            reason = f"the server closed the connection (code {code}{f', {frame.extra}' if frame.extra else ''})"
        except ClientConnectionError as error:
            reason = error.message
        finally:
            self._lose(ClientConnectionError(reason))

    def _lose(self, error: ClientConnectionError) -> None:
        self._lost = error
        for stream in self._streams.values():
            stream._lose(error)  # noqa: SLF001  # as above
        self._streams.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)

    def _receive(self, message: m.ServerMessage) -> None:
        match message:
            case m.Prompt() | m.Delta() | m.Status():
                if (stream := self._streams.get(message.id)) is not None:
                    stream._receive(message)  # noqa: SLF001  # as above
            case m.Done():
                if (stream := self._streams.pop(message.id, None)) is not None:
                    stream._receive(message)  # noqa: SLF001  # as above
            case m.Error():
                stream = self._streams.pop(message.id, None) if message.id is not None else None
                if stream is not None:
                    stream._receive(message)  # noqa: SLF001  # as above
                else:
                    self.notices.append(message)
                    del self.notices[:-100]
            case m.Pong():
                if (pong := self._pongs.get(message.ts)) is not None and not pong.done():
                    pong.set_result(message.now)
            case m.Drain():
                self.draining = message
            case _:
                pass


@asynccontextmanager
async def connect(url: str, *, codec: Literal["json", "msgpack"] = "json", timeout: float = 10.0) -> AsyncIterator[Client]:
    """A connection that is ready for streams; closed when the block is left.

    Args:
        url: such as ws://127.0.0.1:8000/v1/stream.
        timeout: seconds for connecting and for the server's welcome.

    Raises:
        ClientConnectionError: nobody answers there, or the server refused.
    """
    chosen = m.CODECS[_CODECS[codec]]
    async with aiohttp.ClientSession() as http:
        client = await _open(http, url, chosen, timeout)
        reader = asyncio.create_task(client._read(), name="streamkv-client")  # noqa: SLF001  # made here
        try:
            yield client
        finally:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(timeout):
                    await client._send(m.Bye())  # noqa: SLF001  # made here
                    await client._socket.close()  # noqa: SLF001  # made here
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader


async def _open(http: aiohttp.ClientSession, url: str, codec: m.Codec, timeout: float) -> Client:
    try:
        async with asyncio.timeout(timeout):
            socket = await http.ws_connect(
                url,
                protocols=(codec.subprotocol,),
                max_msg_size=16 << 20,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=3.0),
            )
            client = Client(socket, codec)
            try:
                client.welcome = await _greet(client)
            except BaseException:
                await socket.close()
                raise
            return client
    except aiohttp.WSServerHandshakeError as error:
        raise ClientConnectionError(f"the server at {url} refused the connection: HTTP {error.status}") from error
    except TimeoutError as error:  # before OSError, of which it is one
        raise ClientConnectionError(f"the server at {url} did not answer within {timeout:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ClientConnectionError(f"no server at {url}: start one with `streamkv serve`") from error


async def _greet(client: Client) -> m.Welcome:
    await client._send(m.Hello(client="streamkv-python"))  # noqa: SLF001  # made here
    socket = client._socket  # noqa: SLF001  # as above
    frame = await socket.receive()
    if frame.type not in _DATA:
        raise ClientConnectionError(f"the server closed the connection (code {socket.close_code})")
    welcome = _decoded(client._codec, frame)  # noqa: SLF001  # as above
    if not isinstance(welcome, m.Welcome):
        raise ClientConnectionError("the server did not send welcome")
    return welcome


def _decoded(codec: m.Codec, frame: aiohttp.WSMessage) -> m.ServerMessage:
    data = frame.data.encode() if isinstance(frame.data, str) else frame.data
    try:
        message: m.ServerMessage = codec.decode_server(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClientConnectionError("the server sent what is no message of the protocol") from error
    return message

"""The client: one session, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import aiohttp
import msgspec

from streamkv.client.socket import ClientConnectionError, MessageSocket, open_socket
from streamkv.client.stream import Stream
from streamkv.errors import InvalidRequestError
from streamkv.protocol import messages as m
from streamkv.sampling_params import MAX_N

__all__ = ["Client", "connect"]

_ENVELOPE_BYTES: Final = 128
"""More than a `create` has around its body, and than each id adds."""

_CODECS: Final = {"json": "streamkv.v1.json", "msgpack": "streamkv.v1.msgpack"}
_FIRST_WAIT_S: Final = 0.25
_LONGEST_WAIT_S: Final = 8.0

Make = Callable[[], m.ClientMessage | None]


@dataclass(frozen=True, slots=True)
class _Where:
    """How to connect."""

    http: aiohttp.ClientSession
    url: str
    codec: m.Codec
    timeout: float
    headers: dict[str, str]


class Client:
    """One session. Made by `connect`.

    Attributes:
        welcome: what the server said of itself and its limits, at the latest connection.
        draining: the server has announced that it is going away.
        notices: errors that belong to no stream.
    """

    def __init__(
        self, where: _Where, socket: MessageSocket, welcome: m.Welcome, *, window: int | None, reconnect_s: float
    ) -> None:
        """Connected; nothing is read before `run`."""
        self.welcome = welcome
        self.draining: m.Drain | None = None
        self.notices: list[m.Error] = []
        self._where = where
        self._socket: MessageSocket | None = socket
        self._window = window
        self._reconnect_s = reconnect_s
        self._streams: dict[str, Stream] = {}  # that have not ended
        self._made: dict[str, Make] = {}  # how each of them was asked for
        self._names = itertools.count()
        self._pongs: dict[float, asyncio.Future[float]] = {}
        self._outbox: deque[Make] = deque()
        self._wake = asyncio.Event()
        self._lost: ClientConnectionError | None = None

    # -- asking ---------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Stream:
        """Answer a conversation.

        Args:
            sampling: fields of OpenAI's body and of docs/protocol.md: max_tokens, temperature, stop, tools, ...; and
                `priority` and `traceparent`, which are fields of the message around it.
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
        outer = _message_fields(sampling)
        encoded = msgspec.Raw(self._where.codec.encode(body | sampling))

        def make(ids: list[str], limit: int | None) -> m.Create:
            return m.Create(api, encoded, ids=ids, max=limit, **outer)

        return self._begin(n, 0, len(bytes(encoded)), make)

    def fork(self, parent: Stream, n: int, at: int, body: dict[str, Any]) -> list[Stream]:
        """New streams from token `at` of an old one; see `Stream.fork`."""
        outer = _message_fields(body)
        encoded = msgspec.Raw(self._where.codec.encode(body))

        def make(ids: list[str], limit: int | None) -> m.Fork:
            return m.Fork(parent.id, ids=ids, at=at, body=encoded, max=limit, **outer)

        return self._begin(n, at, len(bytes(encoded)), make)

    def _begin(self, n: int, base: int, size: int, make: Callable[[list[str], int | None], m.ClientMessage]) -> list[Stream]:
        """Name the new streams and ask for them, once per connection until the server has taken them."""
        if not 1 <= n <= MAX_N:
            raise InvalidRequestError(f"n must be an integer from 1 to {MAX_N}", param="n")
        if size + _ENVELOPE_BYTES * (1 + n) > self.welcome.limits.frame:
            # The server would close the connection, and with it every other stream.
            raise InvalidRequestError(
                f"the request has {size} bytes; the server takes frames of up to {self.welcome.limits.frame}"
            )
        streams = [Stream(self, f"s{next(self._names)}", self._window, base) for _ in range(n)]
        if self._lost is not None:
            for stream in streams:
                stream.lose(self._lost)
            return streams

        def ask() -> m.ClientMessage | None:
            ids = [stream.id for stream in streams if not stream.accepted and not stream.ended]
            return make(ids, streams[0].granted) if ids else None

        for stream in streams:
            self._streams[stream.id] = stream
            self._made[stream.id] = ask
        self.send_soon(ask)
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
            self.send_soon(lambda: m.Ping(stamp))
            return await pong
        finally:
            self._pongs.pop(stamp, None)

    # -- sending --------------------------------------------------------------------------------------------------

    def send_soon(self, make: Make) -> None:
        """Queue a message; in the order of the calls, and only what still has a sense when its turn comes."""
        self._outbox.append(make)
        self._wake.set()

    async def _write(self, socket: MessageSocket) -> None:
        while True:
            while self._outbox:
                message = self._outbox.popleft()()
                if message is not None:
                    await socket.send(message)
            self._wake.clear()
            await self._wake.wait()

    # -- the connection -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read, and connect again as long as that may help, until the client is closed or the session is lost."""
        error = ClientConnectionError("the connection was closed")
        try:
            while self._socket is not None:
                error = await self._serve(self._socket)
                await self._socket.close()
                self._socket = None
                for pong in self._pongs.values():
                    if not pong.done():
                        pong.set_exception(error)
                if error.again and self._reconnect_s > 0:
                    self._socket = await self._reconnect(error)
        finally:
            self._lose(error)

    async def _serve(self, socket: MessageSocket) -> ClientConnectionError:
        """Route messages to their streams until the connection ends; why it did."""
        writer = asyncio.create_task(self._write(socket), name="streamkv-client-writer")
        try:
            while True:
                self._receive(await socket.receive())
        except ClientConnectionError as error:
            return error
        finally:
            writer.cancel()
            await asyncio.wait(
                {writer}
            )  # not `await writer`: a cancellation of this very task must not be taken for the writer's

    async def _reconnect(self, lost: ClientConnectionError) -> MessageSocket | None:
        """A new connection of the same session, if the server still has it; with full jitter between the attempts."""
        hello = m.Hello(client="streamkv-python", session=self.welcome.session, epoch=self.welcome.epoch)
        where = self._where
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._reconnect_s):
                for attempt in itertools.count():
                    try:
                        socket, welcome = await open_socket(
                            where.http, where.url, where.codec, hello, where.timeout, where.headers
                        )
                    except ClientConnectionError as error:
                        if not error.again:
                            return None
                        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt)
                        await asyncio.sleep(random.uniform(0.0, longest))  # noqa: S311  # jitter, no secret
                    else:
                        self._go_on(welcome, lost)
                        return socket
        return None

    def _go_on(self, welcome: m.Welcome, lost: ClientConnectionError) -> None:
        """Ask for everything that was under way, once more or from where it stands."""
        self.welcome = welcome
        self.draining = None
        self._outbox.clear()
        for stream in list(self._streams.values()):
            if not stream.accepted and not welcome.resumed:
                continue  # the server never took it, as far as anybody knows: it is asked for again below
            if not welcome.resumed:
                stream.lose(lost)
                del self._streams[stream.id], self._made[stream.id]
                continue
            self.send_soon(self._resumption(stream))
            self.send_soon(stream.cancellation)
        if not welcome.resumed:
            for ask in dict.fromkeys(self._made.values()):
                self.send_soon(ask)

    def _resumption(self, stream: Stream) -> Make:
        def make() -> m.ClientMessage | None:
            if stream.ended:
                return None
            return m.Resume(stream.id, stream.num_tokens, self.welcome.epoch, max=stream.granted)

        return make

    def _lose(self, error: ClientConnectionError) -> None:
        self._lost = error
        for stream in self._streams.values():
            stream.lose(error)
        self._streams.clear()
        self._made.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)

    async def close(self, timeout: float) -> None:
        """Say goodbye; what still runs is cancelled."""
        socket, self._socket = self._socket, None
        if socket is not None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(timeout):
                    while self._outbox:  # what was asked for, such as a cancel, is not forgotten
                        message = self._outbox.popleft()()
                        if message is not None:
                            await socket.send(message)
                    await socket.send(m.Bye())
                    await socket.close()

    # -- in -------------------------------------------------------------------------------------------------------

    def _receive(self, message: m.ServerMessage) -> None:
        match message:
            case m.Done() | m.Error():
                self._end(message)
            case m.Pong():
                if (pong := self._pongs.get(message.ts)) is not None and not pong.done():
                    pong.set_result(message.now)
            case m.Drain():
                self.draining = message
            case m.Welcome():
                pass
            case _:
                if (stream := self._streams.get(message.id)) is not None:
                    stream.receive(message)
                    if stream.ended:  # it has lost a token: nothing more of it can be used
                        self._forget(stream.id)

    def _end(self, message: m.Done | m.Error) -> None:
        stream = self._streams.get(message.id) if message.id is not None else None
        if stream is None:
            if isinstance(message, m.Error):
                self.notices.append(message)
                del self.notices[:-100]
            return
        if isinstance(message, m.Error) and message.code == "resume_gone" and not stream.accepted:
            self.send_soon(self._made[stream.id])  # the request was lost with the connection
            return
        stream.receive(message)
        self._forget(stream.id)

    def _forget(self, stream_id: str) -> None:
        del self._streams[stream_id], self._made[stream_id]


def _message_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Take out what belongs into `create` or `fork` themselves, not into their body."""
    return {name: given.pop(name) for name in ("priority", "traceparent") if name in given}


@asynccontextmanager
async def connect(
    url: str,
    *,
    codec: Literal["json", "msgpack"] = "json",
    api_key: str | None = None,
    timeout: float = 10.0,
    window: int | None = 1024,
    reconnect_s: float | None = None,
) -> AsyncIterator[Client]:
    """A connection that is ready for streams; closed when the block is left.

    Args:
        url: such as ws://127.0.0.1:8000/v1/stream.
        api_key: sent as `Authorization: Bearer`.
        timeout: seconds for connecting and for the server's welcome.
        window: tokens that each stream may be ahead of its reader; None = no limit.
        reconnect_s: how long to try for a new connection when one is lost, 0 = not at all; None = as long as the server keeps
            streams that have lost theirs.

    Raises:
        ClientConnectionError: nobody answers there, or the server refused.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with aiohttp.ClientSession() as http:
        where = _Where(http, url, m.CODECS[_CODECS[codec]], timeout, headers)
        socket, welcome = await open_socket(http, url, where.codec, m.Hello(client="streamkv-python"), timeout, headers)
        patience = welcome.grace_s if reconnect_s is None else reconnect_s
        client = Client(where, socket, welcome, window=window, reconnect_s=patience)
        running = asyncio.create_task(client.run(), name="streamkv-client")
        try:
            yield client
        finally:
            await client.close(timeout)
            running.cancel()
            await asyncio.wait({running})

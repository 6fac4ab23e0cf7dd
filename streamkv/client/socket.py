"""One connection of a client: the upgrade, `hello` and `welcome`, and messages instead of frames."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import aiohttp
import msgspec

from streamkv.errors import StreamKVError
from streamkv.protocol import messages as m

__all__ = ["ClientConnectionError", "MessageSocket", "open_socket"]

_DATA: Final = (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)
_AGAIN: Final = frozenset({None, 1001, 1006, 1011, 1012, 1013, 4440})
"""Close codes after which a new connection may do better; all others say that the client is wrong, or has been replaced."""


class ClientConnectionError(StreamKVError):
    """The server cannot be reached, refused the connection, or went away."""

    code = "connection"
    retryable = True

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class MessageSocket:
    """A WebSocket that has been greeted."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, codec: m.Codec) -> None:
        self._socket = socket
        self._codec = codec

    async def send(self, message: m.ClientMessage) -> None:
        """Send; a connection that is gone is the reader's to report."""
        data = self._codec.encode(message)
        with contextlib.suppress(ConnectionError):
            await self._socket.send_frame(data, aiohttp.WSMsgType.TEXT if self._codec.text else aiohttp.WSMsgType.BINARY)

    async def receive(self) -> m.ServerMessage:
        """The next message.

        Raises:
            ClientConnectionError: the connection has ended, or what came is no message.
        """
        frame = await self._socket.receive()
        if frame.type in _DATA:
            data = frame.data.encode() if isinstance(frame.data, str) else frame.data
            try:
                message: m.ServerMessage = self._codec.decode_server(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ClientConnectionError("the server sent what is no message of the protocol") from error
            return message
        # `close_code` says 1006 if our answer came too late; the frame itself says why.
        code = frame.data if frame.type is aiohttp.WSMsgType.CLOSE else self._socket.close_code
        reason = f", {frame.extra}" if frame.extra else ""
        raise ClientConnectionError(f"the server closed the connection (code {code}{reason})", again=code in _AGAIN)

    async def close(self) -> None:
        """Say goodbye and close."""
        await self._socket.close()


async def open_socket(
    http: aiohttp.ClientSession, url: str, codec: m.Codec, hello: m.Hello, timeout: float, headers: dict[str, str]
) -> tuple[MessageSocket, m.Welcome]:
    """Connect and greet.

    Raises:
        ClientConnectionError: nobody answers there, or the server refused; `again` tells whether to try later.
    """
    try:
        async with asyncio.timeout(timeout):
            socket = await http.ws_connect(
                url,
                protocols=(codec.subprotocol,),
                headers=headers,
                max_msg_size=16 << 20,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=3.0),
            )
            greeted = MessageSocket(socket, codec)
            try:
                return greeted, await _greet(greeted, hello)
            except BaseException:
                await socket.close()
                raise
    except aiohttp.WSServerHandshakeError as error:
        message = f"the server at {url} refused the connection: HTTP {error.status}"
        raise ClientConnectionError(message, again=error.status in (429, 502, 503, 504)) from error
    except TimeoutError as error:  # before OSError, of which it is one
        raise ClientConnectionError(f"the server at {url} did not answer within {timeout:g} s", again=True) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ClientConnectionError(f"no server at {url}: start one with `streamkv serve`", again=True) from error


async def _greet(socket: MessageSocket, hello: m.Hello) -> m.Welcome:
    await socket.send(hello)
    welcome = await socket.receive()
    if not isinstance(welcome, m.Welcome):
        raise ClientConnectionError("the server did not send welcome")
    return welcome

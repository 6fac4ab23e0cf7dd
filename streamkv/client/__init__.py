"""Async Python client: many streams on one WebSocket, which survive a lost connection.

    async with connect("ws://127.0.0.1:8000/v1/stream") as client:
        async for delta in client.chat([{"role": "user", "content": "Hello"}], max_tokens=64):
            print(delta.x, end="", flush=True)

Leaving an `async with client.chat(...) as stream` block before the end cancels the stream on the server. Credit is granted as
deltas are consumed, so that a slow reader slows down its own stream and nothing else.
"""

from __future__ import annotations

from streamkv.client.client import Client, connect
from streamkv.client.socket import ClientConnectionError
from streamkv.client.stream import RemoteError, Stream

__all__ = ["Client", "ClientConnectionError", "RemoteError", "Stream", "connect"]

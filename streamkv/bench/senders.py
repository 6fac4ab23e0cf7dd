"""The two ways to a server: many streams on each WebSocket, or one HTTP request with server-sent events for each stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec

from streamkv.bench.results import Outcome
from streamkv.client import Client, ClientConnectionError, RemoteError, connect
from streamkv.errors import ConfigError

__all__ = ["DOORS", "Job", "Sender", "Target", "open_sender"]

DOORS: Final = ("native", "sse")


@dataclass(frozen=True, slots=True)
class Job:
    """One request, greedy and past the end-of-sequence token; `stop_after`: give up after so many tokens."""

    prompt: list[int]
    max_tokens: int
    stop_after: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where to.

    Attributes:
        base: scheme, host and port, such as http://127.0.0.1:8000.
        per_socket: streams on one WebSocket; None = as many as the server runs at once.
    """

    base: str
    door: str = "native"
    per_socket: int | None = None
    api_key: str | None = None

    @classmethod
    def at(cls, url: str, **options: Any) -> Target:
        """Of any URL of the server: http, https, ws or wss, with or without a path.

        Raises:
            ConfigError: it is no such URL.
        """
        parts = urlsplit(url)
        scheme = {"http": "http", "ws": "http", "https": "https", "wss": "https"}.get(parts.scheme)
        if scheme is None or not parts.netloc:
            raise ConfigError(f"{url!r} is no URL of a server; write for example http://127.0.0.1:8000", param="url")
        return cls(f"{scheme}://{parts.netloc}", **options)


class Sender(Protocol):
    """Something that carries out jobs."""

    model: str

    async def prepare(self, streams: int) -> None:
        """Open what it takes for so many at once, so that it is not measured."""

    async def send(self, job: Job, outcome: Outcome) -> None:
        """Follow one request to its end; never raises for what the server does."""


@asynccontextmanager
async def open_sender(target: Target) -> AsyncIterator[Sender]:
    """Connected; closed when the block is left.

    Raises:
        ClientConnectionError: nobody answers there.
    """
    async with AsyncExitStack() as stack:
        if target.door == "native":
            native = _Native(target, stack)
            await native.prepare(1)
            yield native
            return
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=headers
        )
        http = await stack.enter_async_context(session)
        yield _Sse(http, target.base, await _model_at(http, target.base))


class _Native:
    """WebSockets, one more whenever all are full."""

    def __init__(self, target: Target, stack: AsyncExitStack) -> None:
        self.model = ""
        self._url = f"ws{target.base[4:]}/v1/stream"
        self._target = target
        self._stack = stack
        self._live: dict[Client, int] = {}
        self._capacity = 0
        self._growing = asyncio.Lock()

    async def prepare(self, streams: int) -> None:
        while len(self._live) * self._capacity < streams:
            await self._enlarge()

    async def _enlarge(self) -> None:
        client = await self._stack.enter_async_context(connect(self._url, api_key=self._target.api_key, reconnect_s=0.0))
        self.model = client.welcome.models[0]
        self._capacity = min(self._target.per_socket or client.welcome.limits.streams, client.welcome.limits.streams)
        self._live[client] = 0

    async def send(self, job: Job, outcome: Outcome) -> None:
        try:
            client = await self._place()
        except ClientConnectionError as error:
            outcome.code, outcome.message, outcome.ended = "connection", error.message, time.perf_counter()
            return
        try:
            await self._follow(client, job, outcome)
        except RemoteError as error:
            outcome.code, outcome.message = error.remote_code, error.message
        except ClientConnectionError as error:
            outcome.code, outcome.message = "connection", error.message
        finally:
            outcome.ended = time.perf_counter()
            self._live[client] -= 1

    async def _place(self) -> Client:
        """A connection with room, which is taken."""
        async with self._growing:
            if min(self._live.values()) >= self._capacity:
                await self._enlarge()
            client = min(self._live, key=self._live.__getitem__)
            self._live[client] += 1
            return client

    async def _follow(self, client: Client, job: Job, outcome: Outcome) -> None:
        outcome.sent = time.perf_counter()
        stream = client.complete(job.prompt, max_tokens=job.max_tokens, temperature=0, ignore_eos=True)
        if job.stop_after == 0:
            await stream.cancel()
        async for delta in stream:
            if delta.n:
                outcome.arrivals.append((time.perf_counter(), delta.n))
            if job.stop_after is not None and stream.num_tokens >= job.stop_after:
                await stream.cancel()
        assert stream.done is not None
        outcome.prompt_tokens, outcome.cached_tokens = stream.done.usage.prompt, stream.done.usage.cached
        outcome.code = {"length": "ok", "cancelled": "cancelled"}.get(stream.done.finish_reason, stream.done.finish_reason)
        if outcome.code == "cancelled" and job.stop_after is None:
            outcome.code = "cancelled_by_server"


class _Usage(msgspec.Struct):
    class Details(msgspec.Struct):
        cached_tokens: int = 0

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None
    message: str = ""


class _Chunk(msgspec.Struct):
    class Choice(msgspec.Struct):
        text: str = ""

    choices: list[Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_DECODE: Final = msgspec.json.Decoder(_Chunk).decode


class _Sse:
    """POST /v1/completions with `stream`."""

    def __init__(self, http: aiohttp.ClientSession, base: str, model: str) -> None:
        self.model = model
        self._http = http
        self._url = f"{base}/v1/completions"

    async def prepare(self, streams: int) -> None:
        pass  # each request brings its own connection

    async def send(self, job: Job, outcome: Outcome) -> None:
        body = {
            "model": self.model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # With the count in every chunk: a chunk may hold several tokens.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        outcome.sent = time.perf_counter()
        try:
            async with self._http.post(self._url, json=body) as response:
                await self._follow(response, job, outcome)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            outcome.code, outcome.message = "connection", str(error)
        outcome.ended = time.perf_counter()

    async def _follow(self, response: aiohttp.ClientResponse, job: Job, outcome: Outcome) -> None:
        if response.status != 200:
            _fail(outcome, response.status, await response.read())
            return
        counted = 0
        async for line in response.content:
            if job.stop_after is not None and counted >= job.stop_after:
                outcome.code = "cancelled"
                response.close()  # which is how an HTTP client cancels
                return
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if not data:
                continue
            if data == b"[DONE]":
                outcome.code = outcome.code or "ok"
                return
            counted = self._count(_DECODE(data), counted, outcome)
        outcome.code = outcome.code or "cut_off"

    @staticmethod
    def _count(chunk: _Chunk, counted: int, outcome: Outcome) -> int:
        """Take one chunk over; how many tokens there are now."""
        if chunk.error is not None:
            outcome.code, outcome.message = str(chunk.error.code or chunk.error.type or "error"), chunk.error.message
            return counted
        now = time.perf_counter()
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
            outcome.prompt_tokens = chunk.usage.prompt_tokens
            details = chunk.usage.prompt_tokens_details
            outcome.cached_tokens = details.cached_tokens if details is not None else 0
        else:
            count = counted + any(choice.text for choice in chunk.choices)
        if count > counted:
            outcome.arrivals.append((now, count - counted))
        return max(count, counted)


def _fail(outcome: Outcome, status: int, data: bytes) -> None:
    outcome.code = f"http_{status}"
    try:
        error = _DECODE(data).error
    except msgspec.DecodeError:
        return
    if error is not None:
        outcome.code, outcome.message = str(error.code or error.type or outcome.code), error.message


async def _model_at(http: aiohttp.ClientSession, base: str) -> str:
    try:
        async with http.get(f"{base}/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except aiohttp.ClientResponseError as error:
        raise ClientConnectionError(f"the server at {base} refused: HTTP {error.status}") from error
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
        raise ClientConnectionError(f"no server at {base}: start one with `streamkv serve`") from error

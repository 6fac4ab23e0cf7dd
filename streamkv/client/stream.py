"""One stream as its reader sees it, whatever connections it takes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from streamkv.client.socket import ClientConnectionError
from streamkv.errors import StreamKVError
from streamkv.protocol import messages as m

__all__ = ["RemoteError", "Stream"]


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


class _Owner(Protocol):
    """What a stream needs of its client."""

    def send_soon(self, make: Callable[[], m.ClientMessage | None]) -> None:
        """Send what `make` gives, if it still gives something when the connection takes it."""

    def fork(self, parent: Stream, n: int, at: int, body: dict[str, Any]) -> list[Stream]:
        """New streams from a token of an old one."""


class Stream:
    """One stream: an async iterator of deltas, and its text so far.

    Attributes:
        id: its name in this session.
        text: all deltas so far, joined; of a fork only its own.
        base: offset of its first token: 0, or where a fork has left its parent.
        num_tokens: offset behind the last token that has come.
        cached: prompt tokens that came from the prefix cache.
        state: what the server last said that it does: queued, prefill, decode, stalled, preempted.
        done: the last frame, once it has come: finish reason, usage, timings, and the embedding or score asked for.
        prompt_logprobs: of the prompt tokens from the second on, if asked for: {"chosen", "rank", "top"}.
        resumes: how often it went on after a lost connection.
    """

    def __init__(self, owner: _Owner, stream_id: str, window: int | None, base: int = 0) -> None:
        self.id = stream_id
        self.text = ""
        self.base = self.num_tokens = base
        self.cached = 0
        self.state = "queued"
        self.done: m.Done | None = None
        self.prompt_logprobs: list[dict[str, Any]] = []
        self.resumes = 0
        self.accepted = False
        self._error: Exception | None = None
        self._owner = owner
        self._window = window
        self._consumed = base
        self._granted = None if window is None else base + window
        self._inbox: deque[m.Delta] = deque()
        self._bare: set[int] = set()  # offsets at which a delta without tokens has come
        self._changed = asyncio.Event()
        self._cancelled = False

    # -- reading --------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[m.Delta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[m.Delta]:
        """Deltas as they come; those that came while nobody looked come at once. Leaving early cancels the stream.

        Raises:
            RemoteError: the stream ended with an error.
            ClientConnectionError: the connection is gone and could not be had again.
        """
        try:
            while True:
                while self._inbox:
                    delta = self._inbox.popleft()
                    self._consume(delta)
                    yield delta
                if self.done is not None:
                    return
                if self._error is not None:
                    raise self._error
                self._changed.clear()
                await self._changed.wait()
        finally:
            await self.cancel()

    def _consume(self, delta: m.Delta) -> None:
        """Grant more once half of the window has been read."""
        self._consumed = max(self._consumed, delta.o + delta.n)
        if self._window is None or self._granted is None or self.ended:
            return
        wanted = self._consumed + self._window
        if wanted - self._granted >= max(1, self._window // 2):
            self._granted = wanted
            self._owner.send_soon(self.credit)

    def credit(self) -> m.Credit | None:
        """What has been granted and consumed so far."""
        return None if self.ended or self._granted is None else m.Credit(self.id, self._granted, self._consumed)

    @property
    def granted(self) -> int | None:
        """Offset that the server may send up to; None = no limit."""
        return self._granted

    async def result(self) -> str:
        """The whole text, once the stream has ended. Raises what iterating raises."""
        async for _ in self:
            pass
        return self.text

    # -- steering -------------------------------------------------------------------------------------------------

    async def cancel(self) -> None:
        """Ask the server to end the stream; nothing happens if it has ended. Never before its `create` has been sent."""
        if not self.ended and not self._cancelled:
            self._cancelled = True
            self._owner.send_soon(self.cancellation)

    def cancellation(self) -> m.Cancel | None:
        """The wish to end it, if there is one and it has not ended."""
        return m.Cancel(self.id) if self._cancelled and not self.ended else None

    def fork(
        self,
        n: int = 1,
        *,
        at: int | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt: str | list[int] | None = None,
        **sampling: Any,
    ) -> list[Stream]:
        """`n` new streams that go their own way from a token of this one, whose computed prefix they share.

        Args:
            at: offset of the first token that is theirs; None = behind what has been received.
            messages, prompt: what follows this stream's output, in a chat or a completion.
            sampling: overrides; without `max_tokens` they have what this stream has left.
        """
        body = dict(sampling)
        if messages is not None:
            body["messages"] = list(messages)
        if prompt is not None:
            body["prompt"] = prompt
        return self._owner.fork(self, n, self.num_tokens if at is None else at, body)

    @property
    def ended(self) -> bool:
        """True once the last frame has come or the stream is lost."""
        return self.done is not None or self._error is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.cancel()

    # -- in: called by the client ---------------------------------------------------------------------------------

    def receive(self, message: m.ServerMessage) -> None:
        """Take a message of this stream over."""
        match message:
            case m.Accepted():
                self.accepted = True
            case m.Resumed():
                self.accepted = True
                self.resumes += 1
            case m.Prompt():
                known = 1 + len(self.prompt_logprobs)
                self.prompt_logprobs.extend(message.lp[max(0, known - message.o) :])
            case m.Delta():
                self._take(message)
            case m.Status():
                self.state = message.state
                if message.cached is not None:
                    self.cached = message.cached
            case m.Done():
                self.done = message
            case m.Error():
                self._error = RemoteError(message)
            case _:
                pass
        self._changed.set()

    def _take(self, delta: m.Delta) -> None:
        """What was sent again and has come before is dropped; what is missing is an error."""
        if delta.n and delta.o + delta.n <= self.num_tokens:
            return
        if delta.o != self.num_tokens:
            self._error = ClientConnectionError(f"stream {self.id}: token {self.num_tokens} expected, {delta.o} came")
            return
        if not delta.n:
            if delta.o in self._bare:
                return
            self._bare.add(delta.o)
        self.text += delta.x
        self.num_tokens += delta.n
        self._inbox.append(msgspec.structs.replace(delta))

    def lose(self, error: Exception) -> None:
        """No connection will bring it back."""
        if not self.ended:
            self._error = error
        self._changed.set()

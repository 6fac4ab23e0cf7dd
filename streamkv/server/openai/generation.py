"""One request in the engine, between the hub's events and the response: merged while nobody takes it, gone when let go."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from streamkv.errors import DrainingError, StreamKVError
from streamkv.sampling_params import TokenLogprobs
from streamkv.server.admission import Admission, Lease, Share
from streamkv.server.principal import Principal
from streamkv.text.events import Delta, Finished, PromptRead, StreamEvent
from streamkv.text.streams import PreparedPrompt, TextStreams

__all__ = ["Generation", "GenerationError", "Piece", "Workload"]

_LOGPROB_BYTES: Final = 24  # of one (token id, value), as JSON
_MAX_TEXTS: Final = 256

T = TypeVar("T")


class GenerationError(StreamKVError):
    """A request ended with an error after it had been taken; `code` is the engine's word for it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # known only now: one of the wire protocol's closed set


class Piece:
    """What one sample has produced since somebody last looked."""

    __slots__ = ("_texts", "finished", "index", "logprobs", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids = array("i")  # 4 bytes each, however long nobody looks
        self.logprobs: list[TokenLogprobs] = []
        self.finished: Finished | None = None
        self._texts: list[str] = []

    def add(self, delta: Delta) -> None:
        """Append what has come."""
        self._texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs.extend(delta.logprobs)
        if len(self._texts) > _MAX_TEXTS:
            self._texts = ["".join(self._texts)]  # many small strings take many times the memory of their text

    @property
    def text(self) -> str:
        """All of its text."""
        return self._texts[0] if len(self._texts) == 1 else "".join(self._texts)


class Generation:
    """One prompt and its samples; made by `Workload.generation`.

    Attributes:
        arrived: set when there is something to take, or to fail with.
        ended: set when nothing more will come.
        failure: why it has failed; comes after what had arrived before.
        prompt_logprobs: of the prompt tokens after the first, as far as they were asked for and are known.
    """

    def __init__(self, work: Workload, rid: str, n: int, limit: int, overflowed: Callable[[Generation], None]) -> None:
        """Nothing is in the engine yet."""
        self.arrived = asyncio.Event()
        self.ended = asyncio.Event()
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._work = work
        self._limit = limit
        self._overflowed = overflowed
        self._ids = {f"{rid}.{index}": index for index in range(n)}
        self._live = set(self._ids)
        self._opening: asyncio.Task[None] | None = None
        self._pieces: dict[int, Piece] = {}
        self._weight = 0
        self.failure: StreamKVError | None = None
        self._released = False

    async def open(
        self, prepared: PreparedPrompt, principal: Principal, *, priority: int = 0, salt: str = "", share: Share | None = None
    ) -> None:
        """Submit; from now on output arrives.

        Args:
            share: what it is part of, if its request has several prompts.

        Raises:
            StreamKVError: it is not admitted, or the engine refuses it.
        """
        if self.failure is not None:
            raise self.failure
        lease = self._work.admission.admit(principal, prepared, list(self._ids), share=share)
        # Half-way through, the engine may have the request and we not its word: this is never interrupted, only outlived.
        self._opening = self._work.spawn(self._submit(lease, prepared, principal, priority, salt))
        await asyncio.shield(self._opening)

    async def _submit(self, lease: Lease, prepared: PreparedPrompt, principal: Principal, priority: int, salt: str) -> None:
        with lease:
            await self._work.streams.open(
                list(self._ids),
                prepared,
                sink=self._sink,
                priority=priority,
                salt=salt,
                tenant=principal.tenant,
                queue_timeout_s=self._work.admission.queue_timeout_s,
            )

    def release(self) -> None:
        """Cancel what still runs. Returns at once, so that it can be called by a handler that is being cancelled."""
        if not self._released:
            self._released = True
            self._pieces.clear()
            if self._live and self._opening is not None:
                self._work.spawn(self._cancel(self._opening))

    async def _cancel(self, opening: asyncio.Task[None]) -> None:
        with suppress(Exception):  # it has been raised in `open`
            await opening
            for name in list(self._live):
                await self._work.streams.cancel(name)

    def fail(self, error: StreamKVError) -> None:
        """End it with this error; what has come before is still delivered."""
        if self.failure is None:
            self.failure = error
            self.arrived.set()
            self.ended.set()

    # -- in -------------------------------------------------------------------------------------------------------

    def _sink(self, events: list[StreamEvent]) -> None:
        for event in events:
            self._take_event(event)
        if self._released:
            return
        if self._weight > self._limit:
            self._overflowed(self)
        if self._pieces:
            self.arrived.set()

    def _take_event(self, event: StreamEvent) -> None:
        if isinstance(event, Finished):
            self._live.discard(event.id)
        if self._released:
            return
        if isinstance(event, Delta):
            self._take_delta(event)
        elif isinstance(event, PromptRead):
            self.prompt_logprobs.extend(event.logprobs.entries)
        elif isinstance(event, Finished):
            failure = _failure_of(event)
            if failure is not None:
                self.fail(failure)
            else:
                self._piece(event.id).finished = event
            if not self._live:
                self.ended.set()

    def _take_delta(self, delta: Delta) -> None:
        self._piece(delta.id).add(delta)
        if delta.count or delta.offset:  # an echoed prompt is what the client has sent itself: it does not make it slow
            self._weight += len(delta.text.encode())
        if delta.logprobs is not None:
            self._weight += _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in delta.logprobs)

    def _piece(self, name: str) -> Piece:
        index = self._ids[name]
        return self._pieces.get(index) or self._pieces.setdefault(index, Piece(index))

    # -- out ------------------------------------------------------------------------------------------------------

    def take(self) -> Iterable[Piece]:
        """What has arrived, one piece per sample.

        Raises:
            StreamKVError: the generation has failed, and everything that came before has been taken.
        """
        self.arrived.clear()
        if not self._pieces and self.failure is not None:
            raise self.failure
        if self.failure is not None:
            self.arrived.set()
        pieces, self._pieces, self._weight = self._pieces.values(), {}, 0
        return pieces


def _failure_of(event: Finished) -> StreamKVError | None:
    if event.error is not None:
        return GenerationError(*event.error)
    if event.finish_reason == "cancelled":
        return DrainingError("the server shut down before the answer was complete")
    return None


class Workload:
    """What one door has in the engine. Keeps what must go on although the request's own handler has been cancelled."""

    def __init__(self, streams: TextStreams, admission: Admission, moved: Callable[[], None]) -> None:
        """`moved` is called whenever the last task has ended."""
        self.streams = streams
        self.admission = admission
        self._moved = moved
        self._tasks: set[asyncio.Task[Any]] = set()
        self._generations: set[Generation] = set()
        self._closing: StreamKVError | None = None

    @contextmanager
    def generation(self, rid: str, n: int, *, limit: int, overflowed: Callable[[Generation], None]) -> Iterator[Generation]:
        """A generation to be opened inside the block; leaving it releases it.

        Args:
            limit: bytes that may wait to be taken.
            overflowed: called when more has come.
        """
        generation = Generation(self, rid, n, limit, overflowed)
        self._generations.add(generation)
        if self._closing is not None:
            generation.fail(self._closing)
        try:
            yield generation
        finally:
            generation.release()
            self._generations.discard(generation)

    def close(self, error: StreamKVError) -> None:
        """End all of them, and whatever is still to come."""
        self._closing = error
        for generation in tuple(self._generations):
            generation.fail(error)

    @property
    def idle(self) -> bool:
        """True if nothing is left, not even a cancel on its way to the engine."""
        return not self._generations and not self._tasks

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that is kept until it is done."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._moved()

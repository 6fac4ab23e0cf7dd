"""One request in the engine, between the hub's events and the response: merged while nobody takes it, gone when let go."""

from __future__ import annotations

import asyncio
import contextvars
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, TypeVar

import structlog

from streamkv.errors import DrainingError, StreamKVError
from streamkv.sampling_params import TokenLogprobs
from streamkv.server.admission import Admission, Lease, Share
from streamkv.server.principal import ANONYMOUS, Principal
from streamkv.text.events import Delta, Finished, PromptRead, StreamEvent
from streamkv.text.streams import PreparedPrompt, TextStreams

__all__ = ["Generation", "GenerationError", "Piece", "Workload"]

_LOGPROB_BYTES: Final = 24  # of one (token id, value), as JSON
_MAX_TEXTS: Final = 256
_AT_ONCE: Final = 8
"""Prompts of one request in the engine: enough to fill a step with short ones, and others are not kept waiting."""

log = structlog.get_logger(__name__)

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
    """The prompts of one request and their samples; made by `Workload.generation`.

    Attributes:
        arrived: set when there is something to take, or to fail with.
        ended: set when nothing more will come.
        failure: why it has failed; comes after what had arrived before.
        prompt_logprobs: of each prompt, of its tokens after the first, as far as they were asked for and are known.
    """

    def __init__(
        self,
        work: Workload,
        rid: str,
        prompts: Sequence[PreparedPrompt],
        samples: int,
        limit: int,
        overflowed: Callable[[Generation], None],
    ) -> None:
        """Nothing is in the engine yet."""
        self.arrived = asyncio.Event()
        self.ended = asyncio.Event()
        self.prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
        self.failure: StreamKVError | None = None
        self._work = work
        self._prompts = prompts
        self._samples = samples
        self._limit = limit
        self._overflowed = overflowed
        self._names = [f"{rid}.{index}" for index in range(len(prompts) * samples)]
        self._ids = {name: index for index, name in enumerate(self._names)}
        self._live = set(self._names)
        self._left = [samples] * len(prompts)  # samples of each prompt that have not ended
        self._next = 0  # prompt to be submitted
        self._context = contextvars.copy_context()  # of the request, which later prompts belong to as well
        self._openings: list[asyncio.Task[None]] = []
        self._principal, self._priority, self._salt = ANONYMOUS, 0, ""  # until it is opened
        self._held = ExitStack()
        self._share: Share | None = None  # of several prompts
        self._pieces: dict[int, Piece] = {}
        self._weight = 0
        self._released = False

    async def open(self, principal: Principal, *, priority: int = 0, salt: str = "") -> None:
        """Submit the first prompts; each of the others follows when one has ended. From now on output arrives.

        Raises:
            StreamKVError: it is not admitted, or the engine refuses it. If that happens later, the generation fails.
        """
        if self.failure is not None:
            raise self.failure
        self._principal, self._priority, self._salt = principal, priority, salt
        places = 1
        if len(self._prompts) > 1:
            at_once = min(_AT_ONCE, len(self._prompts))
            several = self._work.admission.several(principal, self._prompts, samples=self._samples, at_once=at_once)
            self._share = self._held.enter_context(several)
            places = self._share.places
        for opening in [self._submit_next() for _ in range(places)]:
            # Half-way through, the engine may have the request and we not its word: this is never interrupted, only outlived.
            await asyncio.shield(opening)

    def _submit_next(self) -> asyncio.Task[None]:
        """The next prompt, with all of its samples."""
        number, self._next = self._next, self._next + 1
        first = number * self._samples
        ids, prepared = self._names[first : first + self._samples], self._prompts[number]
        lease = self._work.admission.admit(self._principal, prepared, ids, share=self._share)
        opening = self._work.spawn(self._submit(lease, ids, prepared))
        self._openings.append(opening)
        return opening

    async def _submit(self, lease: Lease, ids: list[str], prepared: PreparedPrompt) -> None:
        with lease:
            await self._work.streams.open(
                ids,
                prepared,
                sink=self._sink,
                priority=self._priority,
                salt=self._salt,
                tenant=self._principal.tenant,
                queue_timeout_s=self._work.admission.queue_timeout_s,
            )

    def _go_on(self) -> None:
        """A prompt has ended: there is a place for another one."""
        if self.failure is not None or self._next == len(self._prompts):
            return
        try:
            self._context.run(self._submit_next).add_done_callback(self._opened)
        except StreamKVError as error:
            self.fail(error)

    def _opened(self, opening: asyncio.Task[None]) -> None:
        error = None if opening.cancelled() else opening.exception()
        if isinstance(error, StreamKVError):
            self.fail(error)
        elif error is not None:
            log.error("submit_failed", exc_info=error)
            self.fail(StreamKVError("the server failed on this request; its log says why"))

    def release(self) -> None:
        """Cancel what still runs. Returns at once, so that it can be called by a handler that is being cancelled."""
        if not self._released:
            self._released = True
            self._pieces.clear()
            if self._live and self._openings:
                self._work.spawn(self._cancel())
            self._held.close()

    async def _cancel(self) -> None:
        for opening in self._openings:
            with suppress(Exception):  # it has been raised in `open`
                await opening
        for name in self._names:
            if name in self._live:
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
            self._take_end(event)
        elif self._released:
            return
        elif isinstance(event, Delta):
            self._take_delta(event)
        elif isinstance(event, PromptRead):
            self.prompt_logprobs[self._ids[event.id] // self._samples].extend(event.logprobs.entries)

    def _take_end(self, event: Finished) -> None:
        self._live.discard(event.id)
        if self._released:
            return
        failure = _failure_of(event)
        if failure is not None:
            self.fail(failure)
        else:
            self._piece(event.id).finished = event
        if not self._live:
            self.ended.set()
        number = self._ids[event.id] // self._samples
        self._left[number] -= 1
        if not self._left[number]:
            self._go_on()

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
    def generation(
        self,
        rid: str,
        prompts: Sequence[PreparedPrompt],
        samples: int,
        *,
        limit: int,
        overflowed: Callable[[Generation], None] = lambda _generation: None,
    ) -> Iterator[Generation]:
        """A generation to be opened inside the block; leaving it releases it.

        Args:
            samples: of each prompt; the first one's come first.
            limit: bytes that may wait to be taken.
            overflowed: called when more has come.
        """
        generation = Generation(self, rid, prompts, samples, limit, overflowed)
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

"""The shell of one session: carries out its wishes against the engine, for as long as the session lives."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import structlog

from streamkv.errors import StreamKVError, UnauthorizedError
from streamkv.observe.context import OPERATION, TRACEPARENT, read_traceparent, trace_id
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, Close, ForkOf, GrantCredit, OpenStreams
from streamkv.protocol.bodies import ParsedBody, ParsedEmbedding
from streamkv.protocol.session import Session
from streamkv.server.admission import Admission
from streamkv.server.principal import Principal
from streamkv.server.report import check_report
from streamkv.text.events import Delta, Finished, StreamEvent
from streamkv.text.streams import PreparedPrompt, TextStreams

__all__ = ["LiveSession", "Peer"]

log = structlog.get_logger(__name__)


class Peer(Protocol):
    """The connection that a session is attached to."""

    name: str

    def wake(self) -> None:
        """There may be something to send."""

    def close(self, code: int, reason: str) -> None:
        """Send what is pending, then close."""

    def abort(self, reason: str) -> None:
        """Drop the connection at once."""


@dataclass(slots=True)
class _Family:
    """A stream and its forks: none draws the random numbers of another."""

    next_branch: int = 0

    def take(self, count: int) -> int:
        first = self.next_branch
        self.next_branch += count
        return first


@dataclass(frozen=True, slots=True)
class _Record:
    """What a fork of a stream will need."""

    prepared: PreparedPrompt
    body: ParsedBody
    engine_id: str
    family: _Family


@dataclass(slots=True)
class _Names:
    """Keys of the session's streams and ids of the engine's requests."""

    engine: dict[str, str] = field(default_factory=dict)  # key -> engine id
    keys: dict[str, str] = field(default_factory=dict)
    traced: dict[str, str] = field(default_factory=dict)  # engine id -> traceparent, of those that have one

    def add(self, keys: tuple[str, ...], engine_ids: list[str], traceparent: str | None) -> None:
        self.engine |= dict(zip(keys, engine_ids, strict=True))
        self.keys |= dict(zip(engine_ids, keys, strict=True))
        if traceparent is not None:
            self.traced |= dict.fromkeys(engine_ids, traceparent)

    def drop(self, engine_id: str) -> None:
        self.traced.pop(engine_id, None)
        key = self.keys.pop(engine_id, None)
        if key is not None:
            self.engine.pop(key, None)


class LiveSession:
    """Owner of a `Session` and of everything that it has running in the engine."""

    def __init__(
        self,
        name: str,
        session: Session,
        streams: TextStreams,
        principal: Principal,
        admission: Admission,
        *,
        still_valid: Callable[[Principal], bool],
        on_idle: Callable[[], None],
        on_closed: Callable[[LiveSession], None],
        on_orphans: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over a session.

        Args:
            name: of its requests in the log.
            still_valid: False once the principal's key has been revoked.
            on_idle: called whenever a stream has ended.
            on_closed: called once, when nobody can come back to it any more.
            on_orphans: told of tokens that come while no client is connected.
        """
        self.name = name
        self.session = session
        self.principal = principal
        self.peer: Peer | None = None
        self._streams = streams
        self._admission = admission
        self._still_valid = still_valid
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._on_orphans = on_orphans
        self._clock = clock
        self._names = _Names()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._gone = False

    # -- connections ----------------------------------------------------------------------------------------------

    def receive(self, data: bytes, *, is_text: bool) -> None:
        """One frame from the peer."""
        self.perform(self.session.receive(data, is_text=is_text, now=self._clock()))
        self._wake()

    def next_message(self, *, busy: bool) -> m.ServerMessage | None:
        """For the peer to send, if anything is due; see `Session.next_message`."""
        message = self.session.next_message(self._clock(), busy=busy)
        if isinstance(message, (m.Done, m.Error)):
            self._arm()  # the stream is kept for a while from now on
        return message

    def detach(self, peer: Peer) -> None:
        """The peer is gone. Nothing happens if another one has taken its place."""
        if self.peer is not peer:
            return
        self.peer = None
        self.perform(self.session.detach(self._clock()))
        self._arm(afresh=True)
        self._settle()

    def drain(self, deadline_s: float, reason: str) -> None:
        """Announce that the server is going away. Who has no connection cannot come back in time."""
        if self.session.attached:
            self.session.drain(int(deadline_s * 1000), reason)
            self._wake()
        else:
            self.close()

    def close(self) -> None:
        """End everything."""
        self.perform(list(self.session.close()))
        self._settle()

    async def ended(self) -> None:
        """Wait until nothing of it is under way."""
        while self._tasks:  # one that opens a stream may leave one that cancels it
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _settle(self) -> None:
        """Tell the owner once the session is over."""
        if self.session.closed and not self._gone:
            self._gone = True
            if self._timer is not None:
                self._timer.cancel()
            self._on_closed(self)
        self._on_idle()

    def _wake(self) -> None:
        if self.peer is not None:
            self.peer.wake()

    # -- time -----------------------------------------------------------------------------------------------------

    def _arm(self, *, afresh: bool = False) -> None:
        """Wake up when the session has something to end or to forget."""
        if self._timer is not None and not afresh:
            return  # it fires no later than needed: every new time limit is as long as those before
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.session.next_tick()
        if due < math.inf and not self._gone:
            delay = max(0.0, due - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.perform(self.session.tick(self._clock()))
        self._wake()
        self._arm()
        self._settle()

    # -- wishes of the session ------------------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        """Carry them out."""
        for action in actions:
            match action:
                case OpenStreams():
                    self._spawn(self._open(action))
                case GrantCredit():
                    engine_id = self._names.engine.get(action.key)
                    if engine_id is not None:
                        self._spawn(self._streams.credit(engine_id, action.limit))
                case CancelStream():
                    engine_id = self._names.engine.get(action.key)
                    if engine_id is not None:
                        self._spawn(self._streams.cancel(engine_id))
                case Close():
                    if self.peer is not None:
                        self.peer.close(action.code, action.reason)

    async def _open(self, wish: OpenStreams) -> None:
        """One prompt for all streams, or one input for each."""
        body, streams = wish.body, self._streams
        # In the context of this task alone; without a span of its own the stream is below that of the connection.
        TRACEPARENT.set(read_traceparent(wish.traceparent) or TRACEPARENT.get())
        OPERATION.set("chat" if isinstance(body, ParsedBody) and body.is_chat else "text_completion")
        if isinstance(body, ParsedBody):
            await self._open_some(wish.keys, self._generation(wish, body), wish)
            return
        for key, given in zip(wish.keys, body.inputs, strict=True):
            if isinstance(body, ParsedEmbedding):
                preparing = streams.prepare_embedding(given, body.pooling)
            else:
                preparing = streams.prepare_score(given, body.prompt, logprobs=body.logprobs)
            await self._open_some((key,), _alone(preparing), wish)

    async def _open_some(
        self,
        keys: tuple[str, ...],
        preparing: Awaitable[tuple[PreparedPrompt, ParsedBody | None, _Record | None]],
        wish: OpenStreams,
    ) -> None:
        """Tokenise, check, submit; the answer goes through the session."""
        rid = f"{self.name}-{next(self._numbers)}"
        engine_ids = [f"{rid}.{index}" for index in range(len(keys))]
        about = self._about(rid, TRACEPARENT.get())
        try:
            prepared, body, parent = await preparing
            self._check(prepared)
            if not self.session.wants(keys):
                return
            self._names.add(keys, engine_ids, TRACEPARENT.get())
            family = parent.family if parent is not None else _Family()
            shared = 0 if parent is None else len(parent.prepared.token_ids)
            with self._admission.admit(self.principal, prepared, engine_ids, shared=shared):
                await self._streams.open(
                    engine_ids,
                    prepared,
                    sink=self._sink,
                    priority=wish.priority,
                    salt=self.principal.salt_with(None if body is None else body.cache_salt),
                    tenant=self.principal.tenant,
                    credit=wish.credit,
                    fork_of=parent.engine_id if parent is not None else None,
                    first_branch=family.take(len(keys)),
                    queue_timeout_s=self._admission.queue_timeout_s,
                )
        except StreamKVError as error:
            self._forget(engine_ids)
            about.info("stream_refused", code=error.code, param=error.param)
            self.perform(self.session.refused(keys, error, self._clock()))
        except Exception:
            self._forget(engine_ids)
            about.exception("stream_failed")
            failure = StreamKVError("the server failed on this request; its log says why")
            self.perform(self.session.refused(keys, failure, self._clock()))
        else:
            about.info("stream_opened", streams=len(keys), prompt_tokens=len(prepared.token_ids))
            record = None if body is None else _Record(prepared, body, engine_ids[0], family)
            self._opened(keys, engine_ids, rid, prepared, record)
        self._wake()
        self._arm()
        self._settle()

    def _opened(
        self, keys: tuple[str, ...], engine_ids: list[str], rid: str, prepared: PreparedPrompt, record: _Record | None
    ) -> None:
        """Each sample is forked from its own request."""
        for index, (key, engine_id) in enumerate(zip(keys, engine_ids, strict=True)):
            own = None if record is None else _Record(record.prepared, record.body, engine_id, record.family)
            self.perform(self.session.opened(key, f"{rid}.{index}", len(prepared.token_ids), own, now=self._clock()))

    def _check(self, prepared: PreparedPrompt) -> None:
        check_report(prepared)
        if not self._still_valid(self.principal):
            raise UnauthorizedError("this key is no longer valid")

    async def _generation(self, wish: OpenStreams, body: ParsedBody) -> tuple[PreparedPrompt, ParsedBody, _Record | None]:
        """(what to submit, the body that a fork of it starts from, what it was forked from)."""
        streams, fork = self._streams, wish.fork
        if fork is None:
            return await streams.prepare(body.prompt, body.params, is_chat=body.is_chat, tools=body.tools), body, None
        record: _Record = fork.record
        if body.is_chat and fork.added is not None:
            body = msgspec.structs.replace(body, prompt=[*self._said(record, fork), *fork.added])
            return await streams.prepare(body.prompt, body.params, is_chat=True, tools=body.tools), body, record
        prepared = await streams.prepare_fork(record.prepared, fork.output, body.params, chars=fork.chars, added=fork.added)
        return prepared, msgspec.structs.replace(body, prompt=record.body.prompt), record

    def _said(self, record: _Record, fork: ForkOf) -> list[Any]:
        """The parent's conversation, its answer so far included."""
        prepared = record.prepared
        inherited = prepared.token_ids[len(prepared.token_ids) - prepared.inherited :]
        answer = self._streams.tokenizer.decode([*inherited, *fork.output])
        messages: Any = record.body.prompt
        return [*messages, {"role": "assistant", "content": answer}]

    def _forget(self, engine_ids: list[str]) -> None:
        for engine_id in engine_ids:
            self._names.drop(engine_id)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the engine -----------------------------------------------------------------------------------------------

    def _sink(self, events: list[StreamEvent]) -> None:
        """Events of one step batch; runs on the loop, must not block."""
        renamed: list[StreamEvent] = []
        ended = False
        for event in events:
            key = self._names.keys.get(event.id)
            if key is None:
                continue
            if isinstance(event, Finished):
                ended = True
                self._log_end(event)
                self._names.drop(event.id)
            renamed.append(msgspec.structs.replace(event, id=key))
        if not renamed:
            return
        if self.peer is None:
            self._on_orphans(sum(event.count for event in renamed if isinstance(event, Delta)))
        self.perform(self.session.events(renamed, self._clock()))
        if self.session.too_slow and self.peer is not None:
            self.peer.abort("slow_consumer")
        self._wake()
        self._arm()
        if ended:
            self._settle()

    def _about(self, rid: str, traceparent: str | None) -> structlog.stdlib.BoundLogger:
        """For what happens to one request."""
        names = {"session": self.name, "rid": rid, "tenant": self.principal.tenant, "trace_id": trace_id(traceparent)}
        bound: structlog.stdlib.BoundLogger = log.bind(**{name: value for name, value in names.items() if value})
        return bound

    def _log_end(self, event: Finished) -> None:
        self._about(event.id, self._names.traced.get(event.id)).info(
            "stream_finished",
            reason=event.finish_reason,
            prompt=event.prompt_tokens,
            completion=event.completion_tokens,
            cached=event.cached_tokens,
            ttft=round(event.timings.ttft, 4),
        )


async def _alone(preparing: Awaitable[PreparedPrompt]) -> tuple[PreparedPrompt, None, None]:
    return await preparing, None, None

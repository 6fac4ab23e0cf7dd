"""What a client's messages do to its streams: new ones, credit, resumes, cancels."""

from __future__ import annotations

from typing import Final

from streamkv.errors import DrainingError, ForkGoneError, InvalidRequestError, StreamKVError, TooManyStreamsError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, ForkOf, GrantCredit, OpenStreams
from streamkv.protocol.bodies import Parsed, ParsedBody
from streamkv.protocol.outstream import OutStream, StreamState
from streamkv.protocol.requests import (
    Request,
    Served,
    check_credit,
    check_numbers,
    ids_of,
    read_create,
    read_fork,
    require_id,
)
from streamkv.protocol.stream_table import StreamTable

__all__ = ["ClientSide"]

_BODY_FACTOR: Final = 4
"""Objects are larger than their JSON, and a body is kept as it came and as it was read."""

_OVER: Final = (StreamState.CANCELLING, StreamState.DONE)


class ClientSide:
    """One end of a session's streams; the other is `EngineSide`."""

    __slots__ = ("_epoch", "_served", "_table", "num_replayed")

    def __init__(self, table: StreamTable, served: Served, epoch: str) -> None:
        self._table = table
        self._served = served
        self._epoch = epoch
        self.num_replayed = 0  # tokens sent once more after resumes

    def notice(self, code: str, message: str, param: str | None) -> list[Action]:
        """Tell something that ends no stream."""
        self._table.outbox.say(m.Error(code, message, None, param))
        return []

    def refuse(
        self, ids: tuple[str, ...], code: str, message: str, param: str | None, *, retryable: bool = False
    ) -> list[Action]:
        """Tell that these streams will not be."""
        for stream_id in ids:
            self._table.outbox.say(m.Error(code, message, stream_id, param, retryable))
        return []

    # -- new streams ----------------------------------------------------------------------------------------------

    def begin(self, message: m.Create | m.Fork, codec: m.Codec, now: float, *, draining: bool) -> list[Action]:
        """Check and queue new streams, or tell why there are none."""
        try:
            ids = ids_of(message)
        except InvalidRequestError as error:
            return self.notice(error.code, error.message, error.param)
        taken = next((stream_id for stream_id in ids if stream_id in self._table.alive), None)
        if taken is not None:
            # Without an id: with one it would read as the end of the stream that is alive under it.
            return self.notice("stream_exists", f"stream {taken} is alive; choose another id", "id")
        try:
            if draining:
                raise DrainingError("the server is shutting down; connect to another one")
            self._require_room(len(ids))
            check_numbers(message)
            if isinstance(message, m.Fork):
                return self._fork(ids, message, codec, now)
            return self._open(ids, message, read_create(message, codec, self._served, len(ids)), now)
        except StreamKVError as error:
            return self.refuse(ids, error.code, error.message, error.param, retryable=error.retryable)

    def _require_room(self, count: int) -> None:
        limits = self._table.limits
        most = limits.streams + limits.queue
        if len(self._table.alive) + count > most or count > limits.streams:
            raise TooManyStreamsError(f"at most {most} streams per connection")

    def _fork(self, ids: tuple[str, ...], message: m.Fork, codec: m.Codec, now: float) -> list[Action]:
        parent = self._table.find(message.from_)
        if parent is None or parent.record is None or parent.body is None:
            raise ForkGoneError("the stream to fork has not begun, or is no longer kept", param="from")
        at = parent.num_tokens if message.at is None else message.at
        if not parent.base <= at <= parent.num_tokens:
            wrong = f"at must be from {parent.base} to {parent.num_tokens}, the tokens of the stream so far"
            raise InvalidRequestError(wrong, param="at")
        if message.max is not None and message.max < at:
            raise InvalidRequestError("max is an offset of the fork, and must be at least `at`", param="max")
        output = tuple(parent.output[: at - parent.base])
        request, added = read_fork(message.body, parent.body, codec, self._served, len(ids), len(output))
        return self._open(ids, message, request, now, base=at, fork=ForkOf(parent.record, output, parent.chars_at(at), added))

    def _open(
        self,
        ids: tuple[str, ...],
        message: m.Create | m.Fork,
        request: Request,
        now: float,
        *,
        base: int = 0,
        fork: ForkOf | None = None,
    ) -> list[Action]:
        credit = message.max if _generates(request.parsed) and message.max != m.MAX_CREDIT else None
        keys: list[str] = []
        for stream_id in ids:
            stream = self._table.new(stream_id, now, base=base, credit=credit, keeps=message.on_disconnect == "grace")
            stream.body, stream.body_bytes = (request.api, request.body), _BODY_FACTOR * request.size
            if fork is not None and fork.added is None:
                stream.inherited_chars = fork.chars
            keys.append(stream.key)
        own_credit = None if credit is None else credit - base
        wish = OpenStreams(tuple(keys), request.parsed, message.priority, own_credit, fork, message.traceparent)
        return self._table.start(wish)

    # -- streams that exist ---------------------------------------------------------------------------------------

    def credit(self, message: m.Credit) -> list[Action]:
        """Monotonic, so that duplicates and a wrong order are harmless; unknown and finished ids are ignored."""
        try:
            require_id(message.id)
            check_credit("max", message.max)
            check_credit("ack", message.ack)
        except InvalidRequestError as error:
            return self.notice(error.code, error.message, error.param)
        stream = self._table.alive.get(message.id)
        if stream is None:
            retained = self._table.retained.get(message.id)
            if retained is not None:
                retained.confirm(message.ack)
            return []
        stream.confirm(min(message.ack, stream.offset))
        return self._raise_credit(stream, message.max)

    def _raise_credit(self, stream: OutStream, limit: int) -> list[Action]:
        if stream.credit is None or limit <= stream.credit or stream.state in _OVER:
            return []
        stream.credit = limit
        if stream.state is StreamState.STALLED:
            stream.go_on()
        # Samples of one prompt start with one credit; what each has beyond that is granted once it is opened.
        return [GrantCredit(stream.key, limit - stream.base)] if stream.key in self._table.running else []

    def resume(self, message: m.Resume, now: float) -> list[Action]:
        """Send again what a client lacks, or tell that it is gone."""
        try:
            require_id(message.id)
        except InvalidRequestError as error:
            return self.notice(error.code, error.message, error.param)
        table = self._table
        stream = table.find(message.id)
        here = stream is not None and stream.attached
        # Without an id if it is alive here: with one it would read as its end.
        named = None if here else message.id
        wrong_epoch = message.epoch is not None and message.epoch != self._epoch
        sent = stream.offset if stream is not None else 0
        if stream is None or wrong_epoch or not stream.resume(message.from_):
            table.outbox.say(m.Error("resume_gone", "this part of the stream is no longer kept; create it again", named, "id"))
            if stream is None or here or wrong_epoch:
                return []
            return [*table.give_up(stream), *table.start_waiting()]
        table.revive(stream)
        if not here and stream.end is None:
            stream.since = now
        self.num_replayed += max(0, sent - message.from_)
        table.outbox.say(m.Resumed(message.id, message.from_, stream.state.value))
        table.outbox.attach(stream, now)
        return [] if message.max is None else self._raise_credit(stream, min(max(0, message.max), m.MAX_CREDIT))

    def cancel(self, stream_id: str, now: float) -> list[Action]:
        """Idempotent; unknown and finished ids are ignored, names that no stream can have are not."""
        try:
            require_id(stream_id)
        except InvalidRequestError as error:
            return self.notice(error.code, error.message, error.param)
        table = self._table
        stream = table.alive.get(stream_id)
        if stream is None or stream.state in _OVER:
            return []
        if stream.key in table.running:
            stream.move(StreamState.CANCELLING)
            return [CancelStream(stream.key)]
        # Still waiting here: it ends at once.
        table.leave_queue(stream.key)
        done = m.Done(stream_id, stream.base, "cancelled", m.Usage(0, 0, 0), m.Timings(0.0, 0.0, 0.0, 0.0))
        table.finish(stream, done, now, unopened=True)
        return table.start_waiting()


def _generates(body: Parsed) -> bool:
    """False if no token comes of it: then there is nothing to have credit for."""
    return isinstance(body, ParsedBody) and body.params.max_tokens != 0

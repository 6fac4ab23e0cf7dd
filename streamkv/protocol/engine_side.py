"""What the engine says of a session's streams, on its way to the client."""

from __future__ import annotations

import math
from typing import Any, Final

from streamkv.errors import StreamKVError
from streamkv.protocol import messages as m
from streamkv.protocol.actions import Action, CancelStream, GrantCredit
from streamkv.protocol.outstream import OutStream, StreamState
from streamkv.protocol.stream_table import StreamTable
from streamkv.text import events as text

__all__ = ["EngineSide"]

_TOKEN_BYTES: Final = 40  # of an int in a list


class EngineSide:
    """One end of a session's streams; the other is `ClientSide`."""

    __slots__ = ("_table",)

    def __init__(self, table: StreamTable) -> None:
        self._table = table

    def opened(self, key: str, rid: str, prompt_tokens: int, record: Any, now: float) -> list[Action]:
        """The engine has taken this one; see `Session.opened`."""
        table = self._table
        stream = table.in_engine.get(key)
        if stream is None:
            return [CancelStream(key)]  # given up while the request was on its way
        stream.record = record
        stream.body_bytes += _TOKEN_BYTES * prompt_tokens
        table.outbox.open(stream, m.Accepted(stream.id, rid, prompt_tokens))
        if stream.end is not None:
            del table.in_engine[key]  # its last event has come before this
            return []
        if stream.state is StreamState.CANCELLING:
            return [CancelStream(key)]
        if stream.credit is None:
            return []
        if stream.credit == stream.base and stream.state is StreamState.QUEUED:
            # It sleeps in the engine, which says nothing of who may not even begin.
            self._status(stream, text.Status(key, "stalled"), now)
        # It may have grown while the request was on its way.
        return [GrantCredit(key, stream.credit - stream.base)]

    def refused(self, keys: tuple[str, ...], error: StreamKVError, now: float) -> list[Action]:
        """The engine cannot take these. Returns what may start in their place."""
        # `create` itself has been checked; the engine can only mind what is in the body.
        param = None if error.param is None else f"body.{error.param}"
        retry_after_ms = None if error.retry_after_s is None else math.ceil(error.retry_after_s * 1000)
        for key in keys:
            stream = self._table.in_engine.get(key)
            if stream is not None:
                refusal = m.Error(error.code, error.message, stream.id, param, error.retryable, retry_after_ms)
                self._table.finish(stream, refusal, now, unopened=True)
        return self._table.start_waiting()

    def events(self, events: list[text.StreamEvent], now: float) -> list[Action]:
        """What a step produced, by key. Returns what may start now, and what nobody will ever read."""
        table = self._table
        actions: list[Action] = []
        ended = False
        for event in events:
            stream = table.in_engine.get(event.id)
            if stream is None or stream.end is not None:
                continue  # given up, or an engine that goes on after a last event
            if isinstance(event, text.Delta):
                table.outbox.text(stream, event, now)
                if not stream.attached and stream.num_tokens - stream.ring.start > table.limits.ring:
                    actions += table.give_up(stream)  # what has been forgotten cannot be resumed: do not compute on
            elif isinstance(event, text.PromptRead):
                table.outbox.prompt(stream, event.logprobs)
            elif isinstance(event, text.Status):
                self._status(stream, event, now)
            else:
                table.finish(stream, _ending(event, stream), now)
                ended = True
        return [*actions, *table.start_waiting()] if ended or actions else []

    def _status(self, stream: OutStream, event: text.Status, now: float) -> None:
        if stream.state is StreamState.CANCELLING:
            return
        if stream.state is StreamState.STALLED and event.state == "preempted":
            return  # stalled streams lose their blocks first; this one is stalled all the same, and its time runs
        state = event.state
        if state == "stalled":
            if stream.credit is not None and stream.base + event.tokens < stream.credit:
                state = "decode"  # credit and the news that there was none have crossed
            elif stream.attached:
                stream.since = now
        stream.move(StreamState(state))
        self._table.outbox.status(stream, m.Status(stream.id, state, event.cached))


def _ending(event: text.Finished, stream: OutStream) -> m.Done | m.Error:
    if event.error is not None:
        code, message = event.error
        return m.Error(code, message, stream.id, retryable=code in ("engine_lost", "out_of_memory"))
    timings, score = event.timings, event.score
    perplexity = score.perplexity if score is not None else 0.0
    return m.Done(
        stream.id,
        stream.base + event.completion_tokens,
        event.finish_reason,
        m.Usage(event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        m.Timings(*(round(part, 6) for part in (timings.queue, timings.prefill, timings.ttft, timings.decode))),
        embedding=None if event.embedding is None else event.vector(),
        score=None if score is None else m.Score(score.logprob, score.tokens, perplexity if math.isfinite(perplexity) else None),
        why=_why(event.why),
    )


def _why(why: text.Why) -> m.Why:
    preempted, stalled, lag = (round(part, 6) or None for part in (why.preempted, why.stalled, why.lag))
    return m.Why(why.chunks, why.preemptions, preempted, stalled, lag, why.miss, why.miss_at)

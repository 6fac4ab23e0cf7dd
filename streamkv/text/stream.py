"""One request on its way from tokens to text: detokenised, cut at stop strings, scored, timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from streamkv.engine.api import FinishReason, Miss, StepOutput
from streamkv.sampling_params import Pooling, PromptLogprobs, Sampling, TokenLogprobs
from streamkv.text.detokenizer import IncrementalDetokenizer
from streamkv.text.events import Delta, Finished, PromptRead, Score, Status, StreamEvent, Timings, Why
from streamkv.text.stop import StopStrings
from streamkv.text.tokenizer import TextTokenizer
from streamkv.text.waits import Waits

__all__ = ["ENGINE_LOST", "PreparedPrompt", "Sink", "TextStream"]

ENGINE_LOST: Final = ("engine_lost", "the engine stopped; send the request again later")

Sink = Callable[[list[StreamEvent]], None]
"""Called on the event loop, once per step batch, with the events of all requests that share the sink. Must not block."""


class PreparedPrompt(msgspec.Struct, frozen=True):
    """A checked request, ready to be submitted.

    Attributes:
        hidden_stop_ids: tokens whose text is not shown when they end the request.
        include_stop: the text ends with the stop string that ended it.
        echo: the prompt's text, if the text is to begin with it.
        reports_prompt: log-probabilities of prompt tokens become events.
        score_from: position of the first prompt token that counts for the score; None = no score is asked for.
        pooling: how the prompt becomes a vector; None = it does not.
        inherited: of a fork that goes on in mid-text: how many of the last `token_ids` are output of its parents.
        inherited_chars: characters of their text that the reader has; None = all that is certain.
    """

    token_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    hidden_stop_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    echo: str = ""
    reports_prompt: bool = False
    score_from: int | None = None
    pooling: Pooling | None = None
    inherited: int = 0
    inherited_chars: int | None = None


class TextStream:
    """One request on its way out."""

    __slots__ = (
        "cached",
        "carried",
        "chunks",
        "detokenizer",
        "echo",
        "embedding",
        "finished",
        "first_at",
        "held",
        "held_logprobs",
        "id",
        "miss",
        "offset",
        "prefill_at",
        "prepared",
        "received",
        "scored",
        "sink",
        "stop",
        "submitted_at",
        "total",
        "waits",
    )

    def __init__(self, request_id: str, prepared: PreparedPrompt, tokenizer: TextTokenizer, sink: Sink, now: float) -> None:
        self.id = request_id
        self.prepared = prepared
        prompt, inherited = _split(prepared)
        self.detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=prepared.skip_special_tokens, prompt_ids=prompt)
        # What the parent's output makes certain and its reader has not seen, because the parent held it back.
        known = self.detokenizer.push(inherited)
        self.carried = "" if prepared.inherited_chars is None else known[prepared.inherited_chars :]
        self.stop = StopStrings(prepared.stop, include=prepared.include_stop)
        self.sink = sink
        self.echo = prepared.echo  # still to be delivered
        self.received = 0  # tokens
        self.offset = 0  # tokens delivered
        self.held: list[int] = []  # tokens received whose text is not certain yet
        self.held_logprobs: list[TokenLogprobs] = []
        self.scored, self.total = 0, 0.0
        self.embedding: bytes | None = None
        self.cached = self.chunks = 0
        self.miss: Miss | None = None
        self.waits = Waits()
        self.submitted_at = now
        self.prefill_at: float | None = None
        self.first_at: float | None = None
        self.finished = False

    def take(self, output: StepOutput, now: float, events: list[StreamEvent]) -> bool:
        """Append this output's events; True if a stop string completed and the engine must be told."""
        if output.state is not None:
            if output.state == "prefill" and self.prefill_at is None:
                self.prefill_at = now
                self.cached = output.cached or 0
                self.miss = output.miss
            events.append(Status(self.id, output.state, output.cached, self.received + len(output.token_ids)))
        if output.prompt_logprobs is not None:
            self._take_prompt(output.prompt_logprobs, events)
        self.embedding = output.embedding
        text = self._take_tokens(output, now)
        if output.state in ("stalled", "preempted"):
            self.waits.begin(output.state, now)
        if self.stop.stopped:
            self._deliver(text, events)
            self._end("stop", None, now, events)
            return output.finish_reason is None
        if output.finish_reason is not None:
            self.chunks = self.chunks or output.chunks
            text += self.stop.push(self.detokenizer.finish(), armed=self._armed)
            reason: FinishReason = "stop" if self.stop.stopped else output.finish_reason
            text += self.stop.finish()
            self._deliver(text, events)
            self._end(reason, output.error, now, events)
        elif text:
            self._deliver(text, events)
        return False

    @property
    def _armed(self) -> bool:
        """True once the text may end."""
        return self.received >= self.prepared.sampling.min_tokens

    def _take_prompt(self, logprobs: PromptLogprobs, events: list[StreamEvent]) -> None:
        if self.prepared.reports_prompt:
            events.append(PromptRead(self.id, logprobs))
        if self.prepared.score_from is not None:
            counted = logprobs.entries[max(0, self.prepared.score_from - logprobs.start) :]
            self.scored += len(counted)
            self.total += sum(entry.chosen for entry in counted)

    def _take_tokens(self, output: StepOutput, now: float) -> str:
        """Text that the new tokens make certain."""
        if not output.token_ids:
            return ""
        if self.first_at is None:
            self.first_at = now
            self.chunks = output.chunks
        elif self.waits.kind is not None:
            self.waits.end(now)
        self.received += len(output.token_ids)
        self.held.extend(output.token_ids)
        if output.logprobs is not None:
            self.held_logprobs.extend(output.logprobs)
        shown = output.token_ids
        if output.finish_reason == "stop" and shown[-1] in self.prepared.hidden_stop_ids:
            shown = shown[:-1]  # the token that ended the request is not part of its text
        # What the tokens before `min_tokens` complete ends nothing.
        counting = max(0, self.received - max(1, self.prepared.sampling.min_tokens) + 1)
        early = max(0, len(output.token_ids) - counting)
        released = ""
        for part, armed in ((shown[:early], False), (shown[early:], True)):
            if part or self.carried:
                carried, self.carried = self.carried, ""
                released += self.stop.push(carried + self.detokenizer.push(part), armed=armed)
        return released

    def _deliver(self, text: str, events: list[StreamEvent]) -> None:
        if self.echo:
            events.append(Delta(self.id, 0, 0, self.echo, ()))
            self.echo = ""
        if not self.held and not text:
            return
        count = len(self.held)
        logprobs = tuple(self.held_logprobs) if self.held_logprobs else None
        events.append(Delta(self.id, self.offset, count, text, tuple(self.held), logprobs))
        self.offset += count
        self.held.clear()
        self.held_logprobs.clear()

    def _end(self, reason: FinishReason, error: tuple[str, str] | None, now: float, events: list[StreamEvent]) -> None:
        self.finished = True
        prefill_at = self.prefill_at if self.prefill_at is not None else now
        first_at = self.first_at if self.first_at is not None else now
        timings = Timings(
            queue=prefill_at - self.submitted_at,
            prefill=first_at - prefill_at,
            ttft=first_at - self.submitted_at,
            decode=now - first_at,
        )
        score = Score(self.total, self.scored) if self.prepared.score_from is not None and error is None else None
        self.waits.end(now)
        waits, miss_at = self.waits, self.cached if self.miss is not None else 0
        why = Why(self.chunks, waits.preemptions, waits.preempted, waits.stalled, miss=self.miss, miss_at=miss_at)
        prompt_tokens = len(self.prepared.token_ids)
        events.append(
            Finished(self.id, reason, prompt_tokens, self.offset, self.cached, timings, error, self.embedding, score, why)
        )

    def lose(self, now: float, events: list[StreamEvent]) -> None:
        """The engine is gone."""
        text = self.stop.push(self.detokenizer.finish(), armed=self._armed)
        self._deliver(text + self.stop.finish(), events)
        self._end("error", ENGINE_LOST, now, events)


def _split(prepared: PreparedPrompt) -> tuple[list[int], list[int]]:
    """(what was asked, what the stream's parents have answered)."""
    border = len(prepared.token_ids) - prepared.inherited
    return prepared.token_ids[:border], prepared.token_ids[border:]

"""The two sides of a session as models: a client that checks every frame, and an engine that does what it is told, later."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from streamkv.protocol import messages as m
from streamkv.protocol.actions import CancelStream, ForkOf, GrantCredit, OpenStreams
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs
from streamkv.text.events import Delta, Finished, PromptRead, Score, Status, StreamEvent, Timings

TIMINGS = Timings(0.1, 0.2, 0.3, 0.4)
VECTOR = [0.5, -2.0, 8.0]
ANSWERS: dict[str, dict[str, Any]] = {
    "text": {},
    "prompt": {},
    "embedding": {"embedding": struct.pack("<3f", *VECTOR)},
    "score": {"score": Score(-3.0, 3)},
}
BODIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda _: {"api": "completions", "body": {"prompt": "p", "max_tokens": 50_000}},
    "prompt": lambda _: {"api": "completions", "body": {"prompt": "p", "max_tokens": 0, "prompt_logprobs": 0}},
    "embedding": lambda count: {"api": "embeddings", "body": {"input": ["p"] * count}},
    "score": lambda count: {"api": "score", "body": {"input": ["p"] * count, "prompt": "q", "logprobs": 0}},
}
"""What a stream is wanted for: what comes with its end, and how so many of them are asked for."""


@dataclass
class Kept:
    """What of a stream can be sent again, by brute force: a list of all chunks that were ever sent."""

    limit: int
    base: int
    chunks: list[tuple[int, int, int]] = field(default_factory=list)  # (offset, tokens, characters up to its end)
    start: int = 0

    def __post_init__(self) -> None:
        self.start = self.base

    @property
    def end(self) -> int:
        return max((o + n for o, n, _ in self.chunks), default=self.base)

    @property
    def borders(self) -> set[int]:
        return {self.base} | {o + n for o, n, _ in self.chunks}

    def sent(self, chunk: m.Delta, chars: int) -> None:
        if any((o, n) == (chunk.o, chunk.n) for o, n, _ in self.chunks):
            return  # once more
        assert chunk.o == self.end, "a chunk does not begin where the last one ended"
        self.chunks.append((chunk.o, chunk.n, chars))
        self.start = max(self.start, min(border for border in self.borders if self.end - border <= self.limit))

    def confirmed(self, ack: int) -> None:
        first = max(border for border in self.borders if border <= max(self.base, ack))
        self.start = max(self.start, first)

    def has(self, offset: int) -> bool:
        return offset in self.borders and offset >= self.start


@dataclass
class Run:
    """One life of an id, in the engine."""

    key: str
    group: tuple[str, ...]
    base: int
    credit: int | None
    opened: bool = False
    begun: bool = False
    cancelled: bool = False
    ended: str | None = None
    text: str = ""  # as the session knows it, echo and all
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    echoed: bool = False
    made: int = 0  # tokens, the session may not know of the last ones
    wanted: str = "text"

    @property
    def generates(self) -> bool:
        return self.wanted == "text"

    @property
    def record(self) -> str | None:
        """What a fork of it needs; there is none of embeddings and scores."""
        return self.key if self.wanted in ("text", "prompt") else None

    @property
    def parked(self) -> bool:
        return self.generates and self.credit is not None and self.made >= self.credit


@dataclass
class Life:
    """One life of an id, as its client knows it."""

    id: str
    base: int
    credit: int | None
    keeps: bool
    kept: Kept
    count: int = 0
    text: str = ""
    prompt: int = 0
    extra_at: int | None = None  # where a chunk without tokens has been read
    accepted: bool = False
    away: bool = False  # its connection was lost, and it has not been resumed
    replaying: bool = False
    excuse: str | None = None  # why the session may have forgotten it
    key: str | None = None
    chars: int | None = 0  # of the family's text before its base; None = not known
    since: float = 0.0  # when it was made, lost its connection, was resumed, or ended: the last of these
    resumed: bool = False  # at least once
    wanted: str = "text"

    def __post_init__(self) -> None:
        self.count = self.base

    def read(self, delta: m.Delta) -> None:
        """Each token once, in order; a chunk that came before is dropped, and comes only after a resume."""
        again = delta.o < self.count or (not delta.n and self.extra_at == delta.o)
        if again:
            assert self.replaying, f"{delta} came twice"
            assert delta.o + delta.n <= self.count, f"{delta} was cut anew"
            return
        assert delta.o == self.count, f"{delta} leaves a gap after {self.count}"
        assert self.credit is None or not delta.n or delta.o + delta.n <= self.credit, f"{delta} is beyond {self.credit}"
        assert delta.lp is None or len(delta.lp) <= delta.n
        if not delta.n:
            self.extra_at = delta.o
        self.count += delta.n
        self.text += delta.x


class Engine:
    """Runs by key. What it says is on its way until `events` is asked for it."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}  # without their last event, or not answered yet
        self.past: dict[str, Run] = {}
        self.saying: list[tuple[Run, list[StreamEvent]]] = []

    def run(self, key: str) -> Run:
        return self.runs.get(key) or self.past[key]

    def carry_out(self, action: OpenStreams | GrantCredit | CancelStream, base: int = 0, wanted: str = "text") -> None:
        match action:
            case OpenStreams():
                for key in action.keys:
                    assert key not in self.runs, "opened twice"
                    assert key not in self.past, "a key was used again"
                    self.runs[key] = Run(key, action.keys, base, action.credit, wanted=wanted)
            case GrantCredit():
                run = self.runs[action.key]
                assert run.credit is not None, "credit for a stream without a limit"
                if run.opened:
                    run.credit = max(run.credit, action.limit)
            case CancelStream():
                run = self.runs[action.key]
                if run.opened or run.begun:  # else the request is not there yet, and the engine knows nothing of it
                    run.cancelled = True

    def produce(self, run: Run, kinds: list[tuple[str, int, bool]]) -> None:
        """One step of one stream: (kind, tokens, with text)."""
        run.begun = True
        events: list[StreamEvent] = []
        for kind, count, wordy in kinds:
            if run.parked and kind != "preempted":
                continue  # who may not go on, can only lose its blocks
            if kind == "prompt" and not run.made:
                events.append(PromptRead(run.key, PromptLogprobs(1 + run.prompt, (TokenLogprobs(-1.0, ()),) * count)))
                run.prompt += count
            elif kind in ("prefill", "decode", "preempted"):
                events.append(Status(run.key, kind, 4 if kind == "prefill" else None))  # type: ignore[arg-type]  # as checked
            elif kind in ("text", "logprobs") and run.generates:
                events += self._text(run, count, kind == "logprobs", wordy)
        if events:
            self.saying.append((run, events))

    def _text(self, run: Run, count: int, scored: bool, wordy: bool) -> list[StreamEvent]:
        if run.credit is not None:
            count = min(count, run.credit - run.made)
        if not count and (run.made or run.echoed or run.base):
            return []  # text without tokens comes first of all, as an echo, or last
        run.echoed = run.echoed or not count
        events: list[StreamEvent] = []
        at = run.base + run.made
        text = "".join(f"{at + i}." for i in range(count)) if wordy and count else "" if count else "echo "
        if not text and not count:
            return []
        if run.credit is not None and run.made + count >= run.credit and count:
            events.append(Status(run.key, "stalled", tokens=run.made + count))
        logprobs = (TokenLogprobs(-0.5, ((1, -0.5),)),) * count if scored and count else None
        events.append(Delta(run.key, run.made, count, text, tuple(range(at, at + count)), logprobs))
        run.made += count
        return events

    def finish(self, run: Run, reason: str, tail: str) -> None:
        events: list[StreamEvent] = [Delta(run.key, run.made, 0, tail, ())] if tail and run.made else []
        reason = "cancelled" if run.cancelled else reason
        error = ("internal", "broken") if reason == "error" else None
        answer = {} if error is not None or run.cancelled else ANSWERS[run.wanted]
        events.append(Finished(run.key, reason, 3, run.made, 0, TIMINGS, error, **answer))  # type: ignore[arg-type]  # one of its words
        run.ended = reason
        self.saying.append((run, events))

    def heard(self, run: Run, events: list[StreamEvent], *, still_wanted: bool) -> None:
        """The session is being told."""
        for event in events:
            if isinstance(event, Delta) and still_wanted:
                run.text += event.text
                run.tokens += event.token_ids

    def answered(self, run: Run) -> None:
        """It is forgotten once the session knows of it and of its end; a cancel may cross with that."""
        if run.ended is not None and not any(other is run for other, _ in self.saying):
            self.runs.pop(run.key, None)
            self.past[run.key] = run


def check_fork(fork: ForkOf, parent: Life, run: Run, at: int) -> None:
    """What a fork is told of its parent is what the parent's client has been told."""
    assert fork.record == run.record
    assert list(fork.output) == list(range(parent.base, at))
    if fork.chars is None:
        return
    assert parent.chars is not None, "characters are known of a parent whose own are not"
    if at == parent.base:
        assert fork.chars == parent.chars
    elif at == parent.base + len(run.tokens):
        assert fork.chars == parent.chars + len(run.text.removeprefix("echo "))
    else:
        found = [chars for o, n, chars in parent.kept.chunks if o + n == at]
        assert not found or fork.chars == parent.chars + found[-1]

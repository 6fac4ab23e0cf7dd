"""One stream as a session keeps it: its state, its output that has not been sent, and what could be sent once more."""

from __future__ import annotations

from array import array
from collections import deque
from enum import Enum
from typing import Any, Final, Literal

from streamkv.protocol import messages as m
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.ring import Ring
from streamkv.sampling_params import TokenLogprobs

__all__ = ["STREAM_MOVES", "OutStream", "StreamState"]

_STREAM_BYTES: Final = 4096  # of its own objects, and those of its record beside the tokens
_LOGPROB_BYTES: Final = 264  # of one prompt token's entry
_TOP_BYTES: Final = 132  # of each alternative in it
_NUMBER_BYTES: Final = 32  # of a float in a list


class StreamState(Enum):
    """Where a stream is. Whether its client is connected is another question: `OutStream.attached`."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    STALLED = "stalled"
    """Its client accepts no further token now."""
    PREEMPTED = "preempted"
    CANCELLING = "cancelling"
    DONE = "done"


_LIVE: Final = frozenset(StreamState) - {StreamState.QUEUED}
STREAM_MOVES: Final[dict[StreamState, frozenset[StreamState]]] = {
    StreamState.QUEUED: _LIVE,
    StreamState.PREFILL: _LIVE,
    StreamState.DECODE: _LIVE,
    StreamState.STALLED: _LIVE,
    StreamState.PREEMPTED: _LIVE,
    StreamState.CANCELLING: frozenset({StreamState.DONE}),
    StreamState.DONE: frozenset(),
}


class OutStream:
    """One stream and its output. Owner: its session and that one's outbox.

    Attributes:
        key: its name between session and shell.
        kept: bytes that it was counted with when it was retained.
        base: offset of its first token: 0, or where a fork has left its parent.
        inherited_chars: characters of text that its client has of the tokens before `base` that are output; None = not known.
        chars: characters of its own text in chunks so far, an echoed prompt not counted.
        offset: tokens cut into chunks so far, from the family's first token on.
        attached: the connected client gets its output; a new connection resumes it first.
        credit: absolute offset that the client accepts; None = no limit.
        output: its own token ids, for forks.
        record: whatever the shell needs to fork it; None before it was opened, and for what generates nothing.
        body: (api, the body as it came), for forks.
        body_bytes: memory of what `body` and `record` hold, roughly.
    """

    __slots__ = (
        "attached",
        "base",
        "body",
        "body_bytes",
        "chars",
        "count",
        "credit",
        "end",
        "first_at",
        "id",
        "inherited_chars",
        "keeps",
        "kept",
        "key",
        "logprobs",
        "offset",
        "opened",
        "output",
        "pieces",
        "prompt",
        "record",
        "replay",
        "ring",
        "said_at",
        "said_of_prompt",
        "sent",
        "since",
        "size",
        "state",
        "status",
        "told",
        "weight",
    )

    def __init__(
        self, stream_id: str, now: float, *, key: str = "", base: int = 0, credit: int | None = None, keeps: bool = True
    ) -> None:
        """A new stream, attached. `keeps`: it lives on for a while when the connection is lost."""
        self.id = stream_id
        self.key = key
        self.kept = 0
        self.state = StreamState.QUEUED
        self.attached = True
        self.keeps = keeps
        self.opened = False  # `accepted` is on its way; before, nothing of the stream is sent
        self.base = base
        self.credit = credit
        self.offset = base
        self.inherited_chars: int | None = 0
        self.chars = 0
        self.count = 0  # tokens waiting
        self.pieces: list[str] = []
        self.size = 0  # bytes of text waiting
        self.weight = 0  # bytes of everything waiting
        self.logprobs: list[TokenLogprobs] = []
        self.prompt: deque[m.Prompt] = deque()  # log-probabilities of the prompt, sent before any text
        self.said_of_prompt: list[m.Prompt] = []
        self.ring = Ring(base)
        self.replay: deque[m.Delta] = deque()
        self.first_at = 0.0  # when the oldest waiting piece came
        self.said_at = now  # when the writer last took something
        self.since = now  # when it was detached, stalled, or ended: whatever its next time limit counts from
        self.sent = False  # the first token has gone out
        self.told: Literal["queued", "prefill", "decode", "stalled", "preempted"] = "queued"  # the state that the client knows
        self.status: m.Status | None = None
        self.end: m.Done | m.Error | None = None
        self.output: array[int] = array("i")
        self.record: Any = None
        self.body: tuple[str, dict[str, Any]] | None = None
        self.body_bytes = 0

    def move(self, state: StreamState) -> None:
        """The only way to change the state."""
        assert state in STREAM_MOVES[self.state], f"stream {self.id}: {self.state.value} -> {state.value}"
        self.state = state

    def go_on(self) -> None:
        """It has credit again: an engine says nothing of that."""
        self.move(StreamState.DECODE)
        self.told = "decode" if self.told == "stalled" else self.told
        if self.status is not None:
            self.status = m.Status(self.id, "decode", self.status.cached)

    def settle(self) -> None:
        """It has ended: what only a fork would need goes if there can be none."""
        if self.record is None:
            self.body, self.body_bytes = None, 0

    # -- sending --------------------------------------------------------------------------------------------------

    def due(self, limits: SessionLimits, busy: bool) -> float:
        """When what waits should be sent; -inf = now, inf = not before something comes."""
        if self.status is not None or self.end is not None or self.prompt or self.replay:
            return float("-inf")
        if not self.has_text:
            return float("inf")
        if not self.sent or self.count >= limits.flush_tokens or self.size >= limits.flush_bytes:
            return float("-inf")
        return self.first_at + (limits.flush_busy_s if busy else limits.flush_s)

    @property
    def has_text(self) -> bool:
        """True if a chunk can be cut. Text without tokens waits for the next ones, so that offsets tell chunks apart."""
        return bool(self.count) or (bool(self.pieces) and (self.end is not None or self.offset == self.base))

    @property
    def has_output(self) -> bool:
        """True if anything waits."""
        return self.has_text or bool(self.prompt) or bool(self.replay) or self.status is not None or self.end is not None

    def take(self) -> m.Delta:
        """All text that waits, as one chunk, which is kept for a resume."""
        logprobs = [plain_logprobs(entry) for entry in self.logprobs] or None
        chunk = m.Delta(self.id, self.offset, self.count, "".join(self.pieces), lp=logprobs)
        self.offset += self.count
        self.chars += len(chunk.x)
        self.ring.push(chunk, self.weight, self.chars)
        self.count = self.size = self.weight = 0
        self.pieces.clear()
        self.logprobs.clear()
        self.sent = True
        return chunk

    # -- resuming -------------------------------------------------------------------------------------------------

    def resume(self, offset: int) -> bool:
        """Send again from a token offset on; False if that cannot be done exactly, and then nothing changes."""
        if not self.attached and self.has_text:
            self.take()  # it has waited for nobody: sent again or for the first time, it does not make the client slow
        chunks = self.ring.since(offset)
        if chunks is None:
            return False
        self.replay = deque(chunks)
        if offset == self.base:
            self.prompt = deque([*self.said_of_prompt, *self.prompt])
            self.said_of_prompt = []
        self.confirm(offset)
        return True

    def confirm(self, ack: int) -> None:
        """The client has the tokens before this offset for good."""
        self.ring.trim(ack)
        if ack > self.base:
            self.said_of_prompt = []

    def chars_at(self, at: int) -> int | None:
        """Characters of text that the client has, or will have, of the family's output before this offset; None = not known."""
        before = self.inherited_chars
        if at == self.base or before is None:
            return before
        own = self.chars + sum(map(len, self.pieces)) if at == self.num_tokens else self.ring.chars_at(at)
        return None if own is None else before + own

    @property
    def num_tokens(self) -> int:
        """Offset behind the last token that has come from the engine with its text."""
        return self.offset + self.count

    @property
    def bytes(self) -> int:
        """What it holds in memory, roughly."""
        entries = [entry for frame in (*self.said_of_prompt, *self.prompt) for entry in frame.lp]
        prompts = sum(_LOGPROB_BYTES + _TOP_BYTES * len(entry["top"]) for entry in entries)
        vector = self.end.embedding if isinstance(self.end, m.Done) else None
        answers = prompts + _NUMBER_BYTES * len(vector or ())
        tokens = self.output.itemsize * len(self.output)
        return _STREAM_BYTES + self.weight + self.ring.bytes + tokens + answers + self.body_bytes


def plain_logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    """As the wire has it."""
    return {"chosen": entry.chosen, "rank": entry.rank, "top": [[token, value] for token, value in entry.top]}

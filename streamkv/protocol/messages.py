"""Messages of `/v1/stream`, as JSON (text frames) or MessagePack (binary frames). docs/protocol.md is the contract.

Tagged by `t`. Unknown fields are ignored, unknown types are answered with `error unknown_type`. Bodies of `create` stay raw
until their API is known, so that a mistake in one is that stream's problem and not the connection's.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

__all__ = [
    "CODECS",
    "MAX_CREDIT",
    "SUBPROTOCOLS",
    "Accepted",
    "Bye",
    "Cancel",
    "ClientMessage",
    "Codec",
    "Create",
    "Credit",
    "Delta",
    "Done",
    "Drain",
    "Error",
    "Fork",
    "Hello",
    "Limits",
    "Ping",
    "Pong",
    "Prompt",
    "Resume",
    "Resumed",
    "Score",
    "ServerMessage",
    "Status",
    "Timings",
    "Usage",
    "Welcome",
    "Why",
]

MAX_CREDIT: Final = 2**53 - 1
"""`max` that means "no flow control": the largest integer that JavaScript holds exactly."""

StreamId = str


class _Message(msgspec.Struct, tag_field="t", omit_defaults=True, frozen=True):
    pass


# -- client to server -------------------------------------------------------------------------------------------------


class Hello(_Message, tag="hello", frozen=True):
    """First frame, exactly once."""

    token: str | None = None
    session: str | None = None
    epoch: str | None = None
    client: str | None = None
    caps: list[str] | None = None


class Create(_Message, tag="create", frozen=True):
    """A new stream, or one per sample with `ids`. `body` is the OpenAI HTTP body of that API, `traceparent` W3C's header."""

    api: str
    body: msgspec.Raw
    id: StreamId | None = None
    ids: list[StreamId] | None = None
    max: int | None = None
    on_disconnect: Literal["grace", "cancel"] = "grace"
    priority: int = 0
    traceparent: str | None = None


class Credit(_Message, tag="credit", frozen=True):
    """Absolute token offset that the client accepts."""

    id: StreamId
    max: int
    ack: int = 0


class Cancel(_Message, tag="cancel", frozen=True):
    """End a stream; idempotent."""

    id: StreamId


class Resume(_Message, tag="resume", frozen=True):
    """Go on with a stream after a lost connection: send again what follows the `from` tokens that the client has."""

    id: StreamId
    from_: int = msgspec.field(name="from")
    epoch: str | None = None
    max: int | None = None


class Fork(_Message, tag="fork", frozen=True):
    """New streams that go their own way from token `at` of another one, whose blocks they share. `body` overrides its body."""

    from_: StreamId = msgspec.field(name="from")
    id: StreamId | None = None
    ids: list[StreamId] | None = None
    at: int | None = None
    body: msgspec.Raw = msgspec.Raw()
    max: int | None = None
    on_disconnect: Literal["grace", "cancel"] = "grace"
    priority: int = 0
    traceparent: str | None = None


class Ping(_Message, tag="ping", frozen=True):
    """Answered by `pong`; browsers cannot send WebSocket pings."""

    ts: float = 0.0


class Bye(_Message, tag="bye", frozen=True):
    """Orderly end."""

    cancel: bool = True


ClientMessage = Hello | Create | Credit | Cancel | Resume | Fork | Ping | Bye

# -- server to client -------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    """What a session may do. `window`: advised credit; `ring`: tokens of a stream that can be sent again."""

    streams: int
    queue: int
    window: int
    frame: int
    hello_s: float
    ring: int


class Welcome(_Message, tag="welcome", frozen=True):
    """Reply to `hello`."""

    session: str
    epoch: str
    server: str
    models: list[str]
    limits: Limits
    heartbeat_s: float
    grace_s: float
    resume_s: float
    resumed: bool = False


class Accepted(_Message, tag="accepted", frozen=True):
    """The request is valid and queued; `rid` names it in the server's log."""

    id: StreamId
    rid: str
    prompt_tokens: int | None = None


class Status(_Message, tag="status", frozen=True):
    """A change of state, or a sign of life while no delta flows."""

    id: StreamId
    state: Literal["queued", "prefill", "decode", "stalled", "preempted"]
    cached: int | None = None


class Resumed(_Message, tag="resumed", frozen=True):
    """The stream goes on here: what follows token `from` comes again, then what is new."""

    id: StreamId
    from_: int = msgspec.field(name="from")
    state: Literal["queued", "prefill", "decode", "stalled", "preempted", "cancelling", "done"]


class Prompt(_Message, tag="prompt", frozen=True):
    """Log-probabilities of the prompt tokens `o` .. `o + len(lp) - 1`; the first prompt token has none."""

    id: StreamId
    o: int
    lp: list[dict[str, Any]]


class Delta(_Message, tag="delta", frozen=True):
    """Text of tokens `o` .. `o + n - 1`. An echoed prompt is the text of a first delta with `n` 0."""

    id: StreamId
    o: int
    n: int
    x: str
    k: Literal["text", "reasoning", "tool", "refusal"] = "text"
    lp: list[dict[str, Any]] | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a stream."""

    prompt: int
    completion: int
    cached: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds."""

    queue: float
    prefill: float
    ttft: float
    decode: float


class Why(msgspec.Struct, omit_defaults=True, frozen=True):
    """Why it was slow, why the prefix cache had no more of the prompt: docs/observability.md. Seconds; absent = none."""

    chunks: int = 0
    preemptions: int = 0
    preempted: float | None = None
    stalled: float | None = None
    lag: float | None = None
    miss: Literal["differs", "not_cached", "evicted", "off"] | None = None
    miss_at: int = 0


class Score(msgspec.Struct, frozen=True):
    """Sum of the natural log-probabilities of so many tokens; `perplexity` is exp(-logprob / tokens), null if infinite."""

    logprob: float
    tokens: int
    perplexity: float | None


class Done(_Message, tag="done", frozen=True):
    """Last frame of a stream that did not fail. `embedding` and `score` are the answers of those APIs."""

    id: StreamId
    o: int
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "error"]
    usage: Usage
    timings: Timings
    embedding: list[float] | None = None
    score: Score | None = None
    why: Why | None = None


class Error(_Message, tag="error", frozen=True):
    """With `id`: last frame of that stream. Without: a notice to the connection."""

    code: str
    message: str
    id: StreamId | None = None
    param: str | None = None
    retryable: bool = False
    retry_after_ms: int | None = None


class Pong(_Message, tag="pong", frozen=True):
    """Reply to `ping`; `now` is the server's wall clock."""

    ts: float
    now: float


class Drain(_Message, tag="drain", frozen=True):
    """The server is going away: no new streams; running ones have until the deadline."""

    deadline_ms: int
    reason: str


ServerMessage = Welcome | Accepted | Status | Resumed | Prompt | Delta | Done | Error | Pong | Drain


class Codec(msgspec.Struct, frozen=True):
    """One way to write messages."""

    subprotocol: str
    text: bool
    encode: Any
    decode_client: Any
    decode_server: Any
    decode_any: Any
    body: Any


def _json_codec() -> Codec:
    return Codec(
        "streamkv.v1.json",
        True,
        msgspec.json.Encoder().encode,
        msgspec.json.Decoder(ClientMessage).decode,
        msgspec.json.Decoder(ServerMessage).decode,
        msgspec.json.decode,
        msgspec.json.decode,
    )


def _msgpack_codec() -> Codec:
    return Codec(
        "streamkv.v1.msgpack",
        False,
        msgspec.msgpack.Encoder().encode,
        msgspec.msgpack.Decoder(ClientMessage).decode,
        msgspec.msgpack.Decoder(ServerMessage).decode,
        msgspec.msgpack.decode,
        msgspec.msgpack.decode,
    )


CODECS: Final[dict[str, Codec]] = {codec.subprotocol: codec for codec in (_json_codec(), _msgpack_codec())}
SUBPROTOCOLS: Final = tuple(CODECS)

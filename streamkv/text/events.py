"""What a reader of text is told about its streams. Values only, so that the sans-IO protocol can use them."""

from __future__ import annotations

from typing import Literal

import msgspec

from streamkv.sampling_params import TokenLogprobs

__all__ = ["Delta", "Finished", "Status", "StreamEvent", "Timings"]


class Status(msgspec.Struct, frozen=True, gc=False):
    """A request changed its state; `cached` prompt tokens came from the prefix cache (with state "prefill")."""

    id: str
    state: Literal["prefill", "decode", "preempted"]
    cached: int | None = None


class Delta(msgspec.Struct, frozen=True):
    """Text that tokens offset .. offset + count - 1 made certain. Tokens whose text is held back come with a later delta."""

    id: str
    offset: int
    count: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Timings(msgspec.Struct, frozen=True, gc=False):
    """Seconds: waiting in the queue, prefill until the first token, both together (TTFT), first to last token."""

    queue: float
    prefill: float
    ttft: float
    decode: float


class Finished(msgspec.Struct, frozen=True):
    """The last event of a request; there is exactly one."""

    id: str
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Timings
    error: tuple[str, str] | None = None


StreamEvent = Status | Delta | Finished

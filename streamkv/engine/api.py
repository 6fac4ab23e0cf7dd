"""Seam 1: how everything above the engine speaks to it. Token ids only; text lives above, in `streamkv.text`.

All messages are values that msgspec can encode, so that an engine in another process is one more implementation. What a
step produced travels as one `StepBatch`, never as one message per token per request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from streamkv.sampling_params import Sampling, TokenLogprobs

__all__ = [
    "EngineClient",
    "EngineInfo",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "Sampling",
    "StepBatch",
    "StepOutput",
    "TokenLogprobs",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prompt and its samples.

    Attributes:
        ids: one id per parallel sample, unique in the engine; each is a stream of its own; branch = its index.
        prompt: token ids, at least one.
        sampling: shared by all samples.
        priority: lower comes first (policy `priority`); ignored by `fcfs`.
        salt: isolates the prefix cache: only requests with the same salt share blocks.
        use_cache: False = neither read nor publish cached blocks.
        credit: number of output tokens the client accepts so far (absolute); None = no limit.
    """

    ids: tuple[str, ...]
    prompt: list[int]
    sampling: Sampling
    priority: int = 0
    salt: str = ""
    use_cache: bool = True
    credit: int | None = None


class StepOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one step did for one request. The last one, and only the last, has `finish_reason`.

    Attributes:
        id: the request.
        state: set when it changed: "prefill" (admitted), "decode" (first token), "preempted".
        token_ids: new output tokens, in order.
        logprobs: one per new token, if asked for.
        cached: prompt tokens that came from the prefix cache, set together with state "prefill".
        finish_reason: set on the last output.
        error: (code, sentence), if the reason is "error".
    """

    id: str
    token_ids: tuple[int, ...] = ()
    state: Literal["prefill", "decode", "preempted"] | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached: int | None = None
    finish_reason: FinishReason | None = None
    error: tuple[str, str] | None = None


class StepBatch(msgspec.Struct, frozen=True):
    """All that one step produced, in the order of the batch. `at` is the engine's monotonic clock in seconds."""

    outputs: list[StepOutput]
    at: float


class EngineInfo(msgspec.Struct, frozen=True):
    """Facts that do not change while the engine lives.

    Attributes:
        vocab_size: width of the logits; every token id must be below it.
        eos_token_ids: the model's own end-of-sequence ids.
        epoch: differs for every engine process.
    """

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    backend: str
    dtype: str
    epoch: str


class EngineStats(msgspec.Struct, frozen=True):
    """One consistent look at the engine. free + cached + used = num_blocks."""

    waiting: int
    running: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    last_step_at: float


class EngineClient(Protocol):
    """The engine as the server, `LLM` and `Engine` see it. One consumer reads `steps()`."""

    def describe(self) -> EngineInfo:
        """Constant facts about model and engine."""

    async def submit(self, request: EngineRequest) -> None:
        """Queue a request; after that each of its ids gets exactly one final output through `steps()`.

        Raises:
            InvalidRequestError: it can never be served (ids in use, token id out of range, context, KV capacity).
            OverloadedError: the waiting queue is full.
            DrainingError: the engine is shutting down.
        """

    async def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request in whatever state it is; unknown and finished ids are ignored.

        Its last output carries `reason`; tokens computed after this call are dropped; blocks are free at the next step.
        """

    async def credit(self, request_id: str, limit: int) -> None:
        """Raise the absolute number of output tokens the client accepts; at the limit the request is parked."""

    def steps(self) -> AsyncIterator[StepBatch]:
        """What steps produce, until the engine is closed."""

    async def stats(self) -> EngineStats:
        """One consistent look at queue, blocks and counters."""

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait up to `timeout` seconds for the rest; True if none was left. The rest is cancelled."""

    async def close(self) -> None:
        """Stop; every unfinished request gets a final output first."""

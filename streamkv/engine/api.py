"""Seam 1: how everything above the engine speaks to it. Token ids only; text lives above, in `streamkv.text`.

All messages are values that msgspec can encode, so that an engine in another process is one more implementation. What a
step produced travels as one `StepBatch`, never as one message per token per request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Final, Literal, Protocol

import msgspec

from streamkv.errors import InvalidRequestError
from streamkv.sampling_params import Pooling, PromptLogprobs, Sampling, TokenLogprobs

__all__ = [
    "KV_STATES",
    "STEP_TOKEN_BOUNDS",
    "EngineClient",
    "EngineInfo",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "KVMap",
    "KVOwner",
    "Miss",
    "Pooling",
    "PromptLogprobs",
    "Sampling",
    "StepBatch",
    "StepOutput",
    "TokenLogprobs",
    "check_processors",
    "check_wish",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]

Miss = Literal["differs", "not_cached", "evicted", "off"]
"""Why a prompt was not in the prefix cache from some token on: a cached one has another token there, nothing cached goes on like
it, what did was evicted, the request does not read the cache."""

STEP_TOKEN_BOUNDS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

KV_STATES: Final = ("free", "cached", "used", "fenced")


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prompt and its samples.

    Attributes:
        ids: one id per parallel sample, unique in the engine; each is a stream of its own; branch = its index.
        prompt: token ids, at least one.
        sampling: shared by all samples.
        priority: lower comes first (policy `priority`); ignored by `fcfs`.
        salt: isolates the prefix cache: only requests with the same salt share blocks.
        tenant: who sent it; tenants take turns, and each has its share of the cache.
        use_cache: False = neither read nor publish cached blocks.
        credit: number of output tokens the client accepts so far (absolute); None = no limit.
        pooling: None, or the request asks for one vector of its prompt; then it neither generates nor uses the cache.
        fork_of: a request whose prompt and output this prompt begins with; while it lives their blocks are shared copy-on-write,
            later through the prefix cache. Needs its salt.
        first_branch: branch of the first id; a fork takes branches that nobody of its family has, so that it goes its own way.
        queue_timeout_s: longest time from now to the begin of its prefill, in seconds; later nothing of it is computed, and each
            id ends with the error "deadline_exceeded". None = no limit.
        inherited: how many of the last prompt tokens are output of those that it was forked from; penalties count them as output.
    """

    ids: tuple[str, ...]
    prompt: list[int]
    sampling: Sampling
    priority: int = 0
    salt: str = ""
    tenant: str = ""
    use_cache: bool = True
    credit: int | None = None
    pooling: Pooling | None = None
    fork_of: str | None = None
    first_branch: int = 0
    queue_timeout_s: float | None = None
    inherited: int = 0


class StepOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one step did for one request. The last one, and only the last, has `finish_reason`.

    Attributes:
        id: the request.
        state: set when it changed: "prefill" (admitted), "decode" (first token), "stalled" (no credit for a further token; it
            goes on without a word once there is some), "preempted".
        token_ids: new output tokens, in order.
        logprobs: one per new token, if asked for.
        prompt_logprobs: of further prompt tokens, if asked for: in order, each position once, before any output token.
        embedding: the pooled vector, float32 little-endian, if asked for: on the last output.
        cached: prompt tokens that came from the prefix cache, set together with state "prefill".
        finish_reason: set on the last output.
        error: (code, sentence), if the reason is "error".
        miss: with the first state "prefill": why the prefix cache had no more than `cached` tokens; None = it had all it could.
        chunks: with the first token, or the only output of a request that generates nothing: steps that computed the prompt.
    """

    id: str
    token_ids: tuple[int, ...] = ()
    state: Literal["prefill", "decode", "stalled", "preempted"] | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached: int | None = None
    finish_reason: FinishReason | None = None
    error: tuple[str, str] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: bytes | None = None
    miss: Miss | None = None
    chunks: int = 0


class StepBatch(msgspec.Struct, frozen=True):
    """All that one step produced, in the order of the batch. `at` is the engine's monotonic clock in seconds."""

    outputs: list[StepOutput]
    at: float


class EngineInfo(msgspec.Struct, frozen=True):
    """Facts that do not change while the engine lives.

    Attributes:
        vocab_size: width of the logits; every token id must be below it.
        eos_token_ids: the model's own end-of-sequence ids.
        embedding_dim: width of a pooled vector; 0 = the engine pools nothing.
        logits_processors: names that a request may ask for.
        epoch: differs for every engine process.
        fingerprint: of the weights and what they are computed with; "" = not known.
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
    embedding_dim: int = 0
    logits_processors: tuple[str, ...] = ()
    fingerprint: str = ""


class EngineStats(msgspec.Struct, frozen=True):
    """One consistent look at the engine. free + cached + used = num_blocks.

    Attributes:
        asleep: of those waiting: who waits for credit.
        evictions: cached blocks that were lost to others.
        step_tokens: steps by number of tokens computed: up to `STEP_TOKEN_BOUNDS[i]`, and one entry more for larger ones.
        computed_tokens: by all steps, of prompts and outputs; more than were asked for where preempted ones are computed again.
        drafts, draft_tokens, accepted_tokens: speculation: proposals that were checked, their tokens, and how many were right.
        swapped_out, swapped_in: blocks of preempted requests that were moved to the host, and back.
        host_slots_used: blocks that the host keeps now.
    """

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
    asleep: int = 0
    evictions: int = 0
    step_tokens: tuple[int, ...] = ()
    computed_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    host_slots_used: int = 0


class KVOwner(msgspec.Struct, frozen=True):
    """A request that holds blocks: its id, the salt it came with, its tokens so far, and whether it waits for credit."""

    id: str
    salt: str
    prompt: int
    output: int
    parked: bool = False


class KVMap(msgspec.Struct, frozen=True):
    """Every block of the pool between two steps. Never token ids, never hashes.

    The columns have one little-endian number a block, in the order of block ids.

    Attributes:
        at: when, on the engine's clock.
        states: uint8, index into `KV_STATES`. A fenced block belongs to nobody any more, but a step in flight may still write it.
        owners: int32; >= 0 = index into `requests`; < -1 = cached, and `salts[-2 - n]` is whose it is; -1 = nobody's.
        counts: uint16, requests that share it.
        filled: uint16, slots that hold a token.
        idle_since: float64, when its last owner left it, on the engine's clock; NaN unless it is cached.
        requests: who holds blocks.
        salts: of cached blocks.
    """

    at: float
    step: int
    block_size: int
    states: bytes
    owners: bytes
    counts: bytes
    filled: bytes
    idle_since: bytes
    requests: tuple[KVOwner, ...] = ()
    salts: tuple[str, ...] = ()


class EngineClient(Protocol):
    """The engine as the server, `LLM` and `Engine` see it. One consumer reads `steps()`."""

    def describe(self) -> EngineInfo:
        """Constant facts about model and engine."""

    async def submit(self, request: EngineRequest) -> None:
        """Queue a request; after that each of its ids gets exactly one final output through `steps()`.

        Raises:
            InvalidRequestError: it can never be served (ids in use, token id out of range, context, KV capacity, pooling
                together with generation, an unknown logits processor).
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

    async def kv_map(self) -> KVMap:
        """One consistent look at every block. O(blocks): not for every request."""

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait up to `timeout` seconds for the rest; True if none was left. The rest is cancelled."""

    async def close(self) -> None:
        """Stop; every unfinished request gets a final output first."""


def check_wish(request: EngineRequest, info: EngineInfo) -> None:
    """What no engine can give, whatever its model.

    Raises:
        InvalidRequestError: the first thing wrong with it.
    """
    sampling = request.sampling
    if request.pooling is not None:
        if not info.embedding_dim:
            raise InvalidRequestError("this model gives no embeddings", param="pooling")
        if sampling.max_tokens or sampling.prompt_logprobs is not None or len(request.ids) > 1:
            raise InvalidRequestError("an embedding is one request of one id that generates nothing", param="pooling")
    check_processors((name for name, _ in sampling.processors), info)


def check_processors(names: Iterable[str], info: EngineInfo) -> None:
    """Refuse logits processors that the engine was not started with.

    Raises:
        InvalidRequestError: the first such name.
    """
    for name in names:
        if name not in info.logits_processors:
            known = ", ".join(info.logits_processors) or "none"
            message = f"logits processor {name[:64]!r} is not enabled; enabled: {known}"
            raise InvalidRequestError(message, param="logits_processors")

"""May this request come in now? Four gates, cheapest first, before anything is queued. Pure: clock and chance are arguments.

    a  the tenant's quota: requests and prompt tokens a second, streams at once                    -> rate_limited
    b  requests that wait for their prefill                                                        -> overloaded
    c  prompt tokens that wait <= SLO x measured prefill rate: it would get its first token in time -> overloaded
       and places in a step: who waits beyond the free ones <= SLO x places / mean time in one      -> overloaded
    d  KV blocks: what exceeds the pool <= SLO x measured rate at which blocks come back            -> overloaded

A refusal says when to come again: the backlog divided by the measured rate, with some jitter so that not all come at once.
An idle server refuses nobody. Retrying early costs little, since a refusal is made before anything is queued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from types import TracebackType
from typing import Final, Self

from streamkv.engine.api import EngineInfo, StepBatch
from streamkv.errors import OverloadedError, RateLimitedError
from streamkv.server.limits import Quota, TokenBucket
from streamkv.server.principal import Principal
from streamkv.server.rates import Mean, Rate
from streamkv.text.events import Finished
from streamkv.text.streams import PreparedPrompt

__all__ = ["Admission", "Lease", "Share"]

_JITTER: Final = 0.2
_RETRY_S: Final = (0.05, 300.0)
_UNKNOWN_RETRY_S: Final = 1.0
_FIRST_GUESS_TOKENS: Final = 256.0
"""Output tokens of a request, before any has finished."""


class Lease:
    """What one admitted prompt and its samples take up, until the last of them has ended.

    Use it as a context manager around `TextStreams.open`: if that raises, it is given back.
    """

    __slots__ = ("_admission", "begun", "blocks", "ids", "prompt", "since", "tenant", "tokens", "waiting")

    def __init__(
        self, admission: Admission, tenant: _Tenant | None, ids: Sequence[str], prompt: int, tokens: int, blocks: int
    ) -> None:
        self._admission = admission
        self.tenant = tenant  # who has these streams; None = its share has them
        self.ids = set(ids)  # samples that have not ended
        self.prompt = prompt
        self.tokens = tokens  # expected to be computed before the first token; 0 once that is there
        self.blocks = blocks
        self.waiting = True  # its prefill has not begun
        self.since = 0.0
        self.begun = 0.0  # when its prefill did

    def release(self) -> None:
        """Give everything back; again and again if you like."""
        self._admission.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.release()


class Share:
    """What `Admission.several` has let in.

    Attributes:
        places: how many of its prompts may be in the engine at once, each with all of its samples.
        leases: of those that are.
    """

    __slots__ = ("leases", "places")

    def __init__(self, places: int) -> None:
        self.places = places
        self.leases: list[Lease] = []


class _Tenant:
    """Buckets and streams of one tenant."""

    __slots__ = ("held", "quota", "requests", "streams", "tokens")

    def __init__(self, quota: Quota, now: float) -> None:
        self.streams = 0
        self.held = 0  # of these, places of shares
        self.apply(quota, now)

    def apply(self, quota: Quota, now: float) -> None:
        self.quota = quota
        self.requests = TokenBucket(quota.requests_per_s, now) if quota.requests_per_s is not None else None
        self.tokens = TokenBucket(quota.prompt_tokens_per_s, now) if quota.prompt_tokens_per_s is not None else None

    def charge(self, prompt: int, streams: int) -> None:
        """One request."""
        if self.requests is not None:
            self.requests.take(1)
        if self.tokens is not None:
            self.tokens.take(prompt)
        self.streams += streams


class Admission:
    """Keeps count of everything admitted. Lives on the event loop; told of steps and ends as an observer of the streams."""

    def __init__(
        self,
        info: EngineInfo,
        *,
        slo_ttft_s: float = 30.0,
        max_waiting: int = 1024,
        queue_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        """Nothing is measured yet: until it is, gates c and d are open.

        Args:
            slo_ttft_s: longest time to the first token that is still worth beginning.
            max_waiting: most samples that wait for their prefill.
            queue_timeout_s: how long what is let in may wait for its prefill: for the doors, who ask the engine to end it then.
            clock: the engine's.
        """
        self._info = info
        self._slo = slo_ttft_s
        self._max_waiting = max_waiting
        self.queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._random = random or Random()  # noqa: S311  # jitter, no secret
        self._tenants: dict[str, _Tenant] = {}
        self._by_id: dict[str, Lease] = {}
        self._miss = Mean(1.0)  # share of prompt tokens that the prefix cache does not have
        self._output = Mean(_FIRST_GUESS_TOKENS)
        self._service: Mean | None = None  # seconds from the begin of the prefill to the end, once known
        self._stay = Mean(_UNKNOWN_RETRY_S)  # seconds from admission to end
        self.rejected: Callable[[str], None] = lambda _gate: None
        """Told which gate turns somebody away."""
        self.prefill_rate = Rate()
        self.block_rate = Rate()
        self.waiting = 0
        self.backlog_tokens = 0
        self.blocks = 0
        self.leases = 0

    # -- in -------------------------------------------------------------------------------------------------------

    def admit(
        self,
        principal: Principal,
        prepared: PreparedPrompt,
        ids: Sequence[str],
        *,
        shared: int = 0,
        share: Share | None = None,
    ) -> Lease:
        """Let a prompt in, with one id per sample.

        Args:
            shared: prompt tokens that are surely there already (a fork).
            share: it is one of the prompts that this was given for; its tenant has been charged.

        Raises:
            RateLimitedError: the tenant's quota is used up for now.
            OverloadedError: it would wait too long.
        """
        now = self._clock()
        prompt = len(prepared.token_ids)
        tenant = None if share is not None else self._within_quota(principal, prompt, len(ids), now)
        tokens, blocks = self._in_time(prepared, len(ids), shared, now)
        if tenant is not None:
            tenant.charge(prompt, len(ids))
        lease = Lease(self, tenant, ids, prompt, tokens, blocks)
        if share is not None:
            share.leases = [*(other for other in share.leases if other.ids), lease]
        self._take(lease, now)
        return lease

    @contextmanager
    def several(self, principal: Principal, prompts: Sequence[PreparedPrompt], *, samples: int, at_once: int) -> Iterator[Share]:
        """Let a request of several prompts in; inside the block each of them is admitted with this share.

        To its tenant it is one request with the tokens of all its prompts, charged at once: so the quota refuses all of it or
        nothing. It gets up to `at_once` places, as many as the tenant has streams left, and they count as streams of it.

        Raises:
            RateLimitedError: as `admit`.
            OverloadedError: as `admit` of the first prompt.
        """
        now = self._clock()
        total = sum(len(prepared.token_ids) for prepared in prompts)
        tenant = self._within_quota(principal, total, samples, now)
        self._in_time(prompts[0], samples, 0, now)
        limit = tenant.quota.streams
        share = Share(at_once if limit is None else min(at_once, (limit - tenant.streams) // samples))
        held = share.places * samples
        tenant.charge(total, held)
        tenant.held += held
        try:
            yield share
        finally:
            tenant.held -= held
            tenant.streams -= held
            for lease in share.leases:  # whose cancelling is still on its way
                lease.tenant = tenant
                tenant.streams += len(lease.ids)

    def _within_quota(self, principal: Principal, prompt: int, samples: int, now: float) -> _Tenant:
        tenant = self._tenants.get(principal.tenant)
        if tenant is None:
            tenant = self._tenants[principal.tenant] = _Tenant(principal.quota, now)
        elif tenant.quota != principal.quota:
            tenant.apply(principal.quota, now)
        quota = tenant.quota
        if quota.streams is not None and tenant.streams + samples > quota.streams:
            self.rejected("streams")
            raise RateLimitedError(
                f"this API key's tenant may have {quota.streams} streams at once; wait until some have ended",
                retry_after_s=self._soon(self._stay.value / max(1, tenant.streams)),
            )
        for bucket, amount, unit in ((tenant.requests, 1, "requests"), (tenant.tokens, prompt, "prompt tokens")):
            wait = bucket.wait(amount, now) if bucket is not None else 0.0
            if bucket is not None and wait > 0:
                self.rejected("requests" if bucket is tenant.requests else "prompt_tokens")
                # Not earlier than the bucket is full enough: that would be refused again.
                raise RateLimitedError(
                    f"this API key's tenant may send {bucket.rate:g} {unit} a second", retry_after_s=self._soon(wait, early=False)
                )
        return tenant

    def _place_in_time(self, samples: int) -> None:
        """The prefill rate is measured while places are free: once all are taken, places are what people wait for."""
        if self._service is None or not self.waiting:
            return
        rate = self._info.max_num_seqs / max(self._service.value, 1e-3)  # places that come free in a second
        ahead = len(self._by_id) + samples - self._info.max_num_seqs
        if ahead > self._slo * rate:
            self.rejected("places")
            message = f"{self.waiting} requests are waiting already; try again later"
            raise OverloadedError(message, retry_after_s=self._soon(ahead / rate))

    def _in_time(self, prepared: PreparedPrompt, samples: int, shared: int, now: float) -> tuple[int, int]:
        """The prompt tokens and the blocks that are expected to be needed, which an idle server is never asked for in vain."""
        tokens = max(1, round((len(prepared.token_ids) - shared) * self._miss.value))
        outputs = min(prepared.sampling.max_tokens, round(self._output.value))
        size = self._info.block_size
        blocks = -(-tokens // size) + samples * -(-outputs // size)
        if self.leases:
            self._check_load(tokens, samples, blocks, now)
        return tokens, blocks

    def _check_load(self, tokens: int, samples: int, blocks: int, now: float) -> None:
        rate = self.prefill_rate.per_second(now)
        if self.waiting + samples > self._max_waiting:
            self.rejected("waiting")
            raise OverloadedError(
                f"{self.waiting} requests are waiting already; try again later",
                retry_after_s=self._soon(self.backlog_tokens / rate if rate else _UNKNOWN_RETRY_S),
            )
        # What a single step can compute is never too much, however slow the first steps looked.
        most = max(self._info.max_num_batched_tokens, self._slo * rate) if rate else 0.0
        if rate and self.backlog_tokens and self.backlog_tokens + tokens > most:
            self.rejected("backlog")
            raise OverloadedError(
                f"{self.backlog_tokens} prompt tokens are waiting already; try again later",
                retry_after_s=self._soon(self.backlog_tokens / rate),
            )
        self._place_in_time(samples)
        excess = self.blocks + blocks - self._info.num_blocks
        rate = self.block_rate.per_second(now)
        if rate and excess > self._slo * rate:
            self.rejected("blocks")
            raise OverloadedError(
                "the KV cache is full of running requests; try again later", retry_after_s=self._soon(excess / rate)
            )

    def _take(self, lease: Lease, now: float) -> None:
        self.leases += 1
        self.waiting += len(lease.ids)
        self.backlog_tokens += lease.tokens
        self.blocks += lease.blocks
        self.prefill_rate.busy(now)
        self.block_rate.busy(now)
        lease.since = now
        for request_id in lease.ids:
            assert request_id not in self._by_id, f"{request_id} is in use"
            self._by_id[request_id] = lease

    def _soon(self, seconds: float, *, early: bool = True) -> float:
        jitter = self._random.uniform(-_JITTER if early else 0.0, _JITTER)
        return min(max(seconds * (1.0 + jitter), _RETRY_S[0]), _RETRY_S[1])

    # -- on its way -----------------------------------------------------------------------------------------------

    def batch(self, batch: StepBatch) -> None:
        """What a step did. Once per token of every stream: most of them are told apart by one look."""
        by_id = self._by_id
        for output in batch.outputs:
            lease = by_id.get(output.id)
            if lease is None or not lease.tokens:
                continue
            if output.state == "prefill" and lease.waiting:
                self._begin(lease, output.cached or 0)
            if output.token_ids:
                self._prefilled(lease, batch.at)

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """Known already."""

    def finished(self, event: Finished, now: float) -> Finished:
        """A sample has ended, in whatever way."""
        lease = self._by_id.pop(event.id, None)
        if lease is None:
            return event
        if event.finish_reason in ("stop", "length"):
            self._output.add(event.completion_tokens)
            if lease.tokens:  # it generates nothing: a score, an embedding
                self._prefilled(lease, now)
        self._leave(lease, event.id)
        return event

    def refused(self, ids: Sequence[str]) -> None:
        """The engine did not take these."""
        for request_id in ids:
            lease = self._by_id.pop(request_id, None)
            if lease is not None:
                self._leave(lease, request_id)

    def release(self, lease: Lease) -> None:
        """Give back what is left of a lease."""
        self.refused(tuple(lease.ids))

    def _begin(self, lease: Lease, cached: int) -> None:
        lease.waiting = False
        lease.begun = self._clock()
        self.waiting -= len(lease.ids)
        self._miss.add(1.0 - cached / lease.prompt)
        tokens = max(1, lease.prompt - cached)
        self.backlog_tokens += tokens - lease.tokens
        lease.tokens = tokens

    def _prefilled(self, lease: Lease, now: float) -> None:
        """Its prompt has been computed."""
        if lease.waiting:
            self._begin(lease, 0)
        self.prefill_rate.add(lease.tokens, now)
        self.backlog_tokens -= lease.tokens
        lease.tokens = 0
        if not self.backlog_tokens:
            self.prefill_rate.idle(now)

    def _leave(self, lease: Lease, request_id: str) -> None:
        now = self._clock()
        lease.ids.discard(request_id)
        if lease.waiting:
            self.waiting -= 1
        if lease.tenant is not None:
            lease.tenant.streams -= 1
        if lease.ids:
            return
        lease.waiting = False
        self.backlog_tokens -= lease.tokens
        lease.tokens = 0
        self.leases -= 1
        self.blocks -= lease.blocks
        self._stay.add(now - lease.since)
        if lease.begun:
            if self._service is None:
                self._service = Mean(now - lease.begun)
            self._service.add(now - lease.begun)
        self.block_rate.add(lease.blocks, now)
        if not self.backlog_tokens:
            self.prefill_rate.idle(now)
        if not self.leases:
            self.block_rate.idle(now)

    def check(self) -> None:
        """Prove that the sums are those of the leases that are out. For tests."""
        leases = {id(lease): lease for lease in self._by_id.values()}.values()
        assert self.leases == len(leases)
        assert self.waiting == sum(len(lease.ids) for lease in leases if lease.waiting)
        assert self.backlog_tokens == sum(lease.tokens for lease in leases)
        assert self.blocks == sum(lease.blocks for lease in leases)
        counted = sum(len(lease.ids) for lease in leases if lease.tenant is not None)
        assert sum(tenant.streams - tenant.held for tenant in self._tenants.values()) == counted
        assert all(tenant.held >= 0 for tenant in self._tenants.values())
        assert math.isfinite(self._miss.value)

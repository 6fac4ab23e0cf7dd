"""Admission: its four gates on a made-up clock, that nothing leaks, and what a real server says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamkv.engine.api import EngineRequest, StepBatch, StepOutput
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.errors import OverloadedError, RateLimitedError, StreamKVError
from streamkv.sampling_params import Sampling
from streamkv.server.admission import Admission, Lease
from streamkv.server.limits import Quota
from streamkv.server.principal import Principal
from streamkv.server.rates import Rate
from streamkv.text.events import Finished, Timings
from streamkv.text.observer import NullObserver
from streamkv.text.streams import PreparedPrompt, TextStreams
from tests.server.serving import VOCAB, CountingTokenizer, eventually, serving
from tests.server.wire import ask, bearer, keyed

SOMEBODY = Principal("somebody")


def prepared(tokens: int = 100, max_tokens: int = 50) -> PreparedPrompt:
    return PreparedPrompt(token_ids=[1] * tokens, sampling=Sampling(max_tokens=max_tokens))


class Desk:
    """Admission with a clock that is turned by hand; refusals come without jitter unless asked for."""

    def __init__(self, jitter: bool = False, **options: Any) -> None:
        self.now = 0.0
        random = Random(7)
        if not jitter:
            random.uniform = lambda _low, _high: 0.0  # type: ignore[method-assign]  # no chance in it
        info = msgspec.structs.replace(fake_info(), max_num_batched_tokens=16)
        self.admission = Admission(info, clock=lambda: self.now, random=random, **options)
        self.count = 0

    def admit(self, tokens: int = 100, *, n: int = 1, principal: Principal = SOMEBODY, **options: Any) -> list[str]:
        max_tokens = options.pop("max_tokens", 50)
        self.count += 1
        ids = [f"{self.count}.{index}" for index in range(n)]
        self.admission.admit(principal, prepared(tokens, max_tokens), ids, **options)
        return ids

    def step(self, *outputs: StepOutput) -> None:
        self.admission.batch(StepBatch(list(outputs), self.now))

    def begin(self, request_id: str, cached: int = 0) -> None:
        self.step(StepOutput(request_id, state="prefill", cached=cached))

    def first_token(self, request_id: str) -> None:
        self.step(StepOutput(request_id, (7,), "decode"))

    def finish(self, request_id: str, tokens: int = 50, reason: Any = "length") -> None:
        self.admission.finished(Finished(request_id, reason, 100, tokens, 0, Timings(0, 0, 0, 0)), self.now)

    def serve(self, request_id: str, seconds: float) -> None:
        """Prefill that takes so long, then the end."""
        self.begin(request_id)
        self.now += seconds
        self.first_token(request_id)
        self.finish(request_id)

    def refused(self, kind: type[StreamKVError], **options: Any) -> float:
        before = vars_of(self.admission)
        with pytest.raises(kind) as caught:
            self.admit(**options)
        assert vars_of(self.admission) == before, "a refusal took something"
        assert caught.value.retryable
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s


def vars_of(admission: Admission) -> tuple[int, ...]:
    admission.check()
    return (admission.leases, admission.waiting, admission.backlog_tokens, admission.blocks)


# -- gate a ------------------------------------------------------------------------------------------------------------


def test_gate_a_requests_a_second():
    desk, tenant = Desk(), Principal("t", quota=Quota(requests_per_s=2))
    desk.admit(principal=tenant)
    desk.admit(principal=tenant)
    assert desk.refused(RateLimitedError, principal=tenant) == pytest.approx(0.5)
    desk.admit(principal=Principal("other", quota=Quota(requests_per_s=2)))
    desk.admit()
    desk.now += 0.5
    desk.admit(principal=tenant)


def test_gate_a_prompt_tokens_a_second():
    desk, tenant = Desk(), Principal("t", quota=Quota(prompt_tokens_per_s=100))
    desk.admit(350, principal=tenant)  # more than it ever holds: once, and then it waits for that
    assert desk.refused(RateLimitedError, tokens=10, principal=tenant) == pytest.approx(2.6)
    desk.now += 2.6
    desk.admit(10, principal=tenant)


def test_gate_a_streams_at_once_count_every_sample():
    desk, tenant = Desk(), Principal("t", quota=Quota(streams=3))
    ids = desk.admit(n=2, principal=tenant)
    desk.refused(RateLimitedError, n=2, principal=tenant)
    desk.admit(principal=tenant)
    desk.refused(RateLimitedError, principal=tenant)
    desk.finish(ids[0])
    desk.admit(principal=tenant)


def test_gate_a_is_checked_even_where_nothing_runs_and_refusals_cost_nothing():
    desk, tenant = Desk(), Principal("t", quota=Quota(requests_per_s=1))
    desk.finish(desk.admit(principal=tenant)[0])
    for _ in range(100):
        desk.refused(RateLimitedError, principal=tenant)
    desk.now += 1.0
    desk.admit(principal=tenant)


def test_gate_a_a_changed_quota_holds_from_the_next_request_on():
    desk = Desk()
    desk.admit(principal=Principal("t", quota=Quota(streams=1)))
    desk.refused(RateLimitedError, principal=Principal("t", quota=Quota(streams=1)))
    desk.admit(principal=Principal("t", quota=Quota(streams=2)))


# -- gates b, c, d -----------------------------------------------------------------------------------------------------


def test_gate_b_waiting_requests():
    desk = Desk(max_waiting=3)
    (first,) = desk.admit()
    desk.admit(n=2)
    desk.refused(OverloadedError)
    desk.begin(first)  # it waits no longer
    desk.admit()


def busy(desk: Desk, *, rate: float = 100.0) -> None:
    """Have it measure this prefill rate, and leave it idle."""
    for _ in range(20):
        desk.serve(desk.admit(100)[0], 100 / rate)
    assert desk.admission.prefill_rate.per_second(desk.now) == pytest.approx(rate, rel=0.01)


def test_gate_c_tokens_that_wait_against_the_measured_rate():
    desk = Desk(slo_ttft_s=10.0)
    busy(desk, rate=100.0)
    desk.admit(600)
    desk.admit(300)
    assert desk.refused(OverloadedError, tokens=200) == pytest.approx(900 / 100.0, rel=0.1)
    desk.admit(90)
    # As soon as the first one's prompt has been computed there is room again.
    desk.begin("21.0")
    desk.now += 6.0
    desk.first_token("21.0")
    desk.admit(400)


def test_gate_c_an_idle_server_takes_even_what_takes_long():
    desk = Desk(slo_ttft_s=1.0)
    busy(desk, rate=100.0)
    desk.admit(4000)
    desk.refused(OverloadedError)


def test_gate_c_nothing_is_refused_before_anything_was_measured():
    desk = Desk(slo_ttft_s=0.001)
    for _ in range(100):
        desk.admit(4000)


def test_gate_c_measures_prompts_that_generate_nothing_as_well():
    desk = Desk(slo_ttft_s=10.0)
    for _ in range(20):
        (request_id,) = desk.admit(100, max_tokens=0)
        desk.begin(request_id)
        desk.now += 1.0
        desk.finish(request_id, 0)
    assert desk.admission.prefill_rate.per_second(desk.now) == pytest.approx(100.0, rel=0.01)


def test_gate_c_counts_what_the_cache_is_expected_to_have():
    desk = Desk(slo_ttft_s=10.0)
    for _ in range(200):  # nine tenths of every prompt are cached
        (request_id,) = desk.admit(1000)
        desk.begin(request_id, cached=900)
        desk.now += 1.0
        desk.first_token(request_id)
        desk.finish(request_id)
    for _ in range(9):
        desk.admit(1000)  # 9,000 tokens at 100 a second, and yet in time
    assert desk.admission.backlog_tokens == pytest.approx(900, rel=0.1)
    desk.refused(OverloadedError, tokens=2000)


def test_gate_d_blocks_that_come_back_too_slowly():
    desk = Desk(slo_ttft_s=10.0)
    size = fake_info().block_size
    ids = [desk.admit(100 * size, max_tokens=size)[0] for _ in range(9)]  # 101 blocks each, of 1024
    for request_id in ids:
        desk.begin(request_id)
        desk.now += 1.0
        desk.first_token(request_id)
    desk.now += 1000.0
    desk.finish(ids.pop(), size)
    # 909 of 1024 are taken; in 1000 seconds one request gave its blocks back.
    desk.admit(100 * size, max_tokens=size)
    desk.admit(100 * size, max_tokens=size)
    assert desk.refused(OverloadedError, tokens=100 * size, max_tokens=size) > 1.0


@pytest.mark.parametrize("kind", ["overloaded", "rate_limited"])
def test_retry_after_is_spread_and_a_quota_is_never_told_to_come_too_early(kind: str):
    desk = Desk(jitter=True, slo_ttft_s=10.0)
    tenant = Principal("t", quota=Quota(requests_per_s=0.1))
    if kind == "overloaded":
        busy(desk)
        desk.admit(1000)
        times = [desk.refused(OverloadedError, tokens=500) for _ in range(200)]
        low, high = 8.0, 12.0
    else:
        desk.admit(principal=tenant)
        times = [desk.refused(RateLimitedError, principal=tenant) for _ in range(200)]
        low, high = 10.0, 12.0
    assert low * 0.93 <= min(times) < max(times) <= high * 1.07
    assert len({round(time, 3) for time in times}) > 100


def test_what_was_true_is_that_the_backlog_is_gone_then():
    """Retry-After against a server that really works at the measured rate."""
    desk = Desk(slo_ttft_s=5.0)
    busy(desk, rate=100.0)
    queue = [desk.admit(100)[0] for _ in range(4)]
    after = desk.refused(OverloadedError, tokens=200)
    began = desk.now
    for request_id in queue:
        desk.serve(request_id, 1.0)
    assert desk.now - began == pytest.approx(after, rel=0.1)


# -- nothing leaks -----------------------------------------------------------------------------------------------------


class Comings(RuleBasedStateMachine):
    """Any order of admissions, refusals, failed opens, steps, cancels and ends leaves exactly what is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(slo_ttft_s=2.0, max_waiting=6)
        self.live: dict[str, str] = {}
        self.told: list[float] = []

    @initialize()
    def start(self) -> None:
        self.tenants = [Principal("free"), Principal("few", quota=Quota(streams=3)), Principal("slow", quota=Quota(2, 200, 8))]

    @rule(tenant=st.integers(0, 2), tokens=st.integers(1, 400), n=st.integers(1, 3), fails=st.booleans())
    def come(self, tenant: int, tokens: int, n: int, fails: bool) -> None:
        self.desk.count += 1
        ids = [f"{self.desk.count}.{index}" for index in range(n)]
        try:
            lease = self.desk.admission.admit(self.tenants[tenant], prepared(tokens), ids)
        except (OverloadedError, RateLimitedError) as error:
            self.told.append(error.retry_after_s or 0.0)
            return
        assert isinstance(lease, Lease)
        try:
            with lease:
                if fails:
                    raise ValueError("the engine refuses")
        except ValueError:
            return
        self.live |= dict.fromkeys(ids, "queued")

    @precondition(lambda self: self.live)
    @rule(data=st.data(), event=st.sampled_from(["prefill", "token", "both", "cancel", "error", "end", "refused"]))
    def go_on(self, data: st.DataObject, event: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        if event in ("prefill", "both"):
            self.desk.begin(request_id, cached=data.draw(st.integers(0, 1)))
        if event in ("token", "both"):
            self.desk.first_token(request_id)
        if event == "refused":
            self.desk.admission.refused([request_id])
            del self.live[request_id]
        if event in ("cancel", "error", "end"):
            reason = {"cancel": "cancelled", "error": "error", "end": "stop"}[event]
            self.desk.finish(request_id, reason=reason)
            del self.live[request_id]

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.desk.now += seconds

    @invariant()
    def what_is_out_is_what_is_alive(self) -> None:
        assert all(0 < seconds <= 300 for seconds in self.told)
        self.desk.admission.check()
        assert self.desk.admission._by_id.keys() == self.live.keys()

    def teardown(self) -> None:
        for request_id in list(self.live):
            self.desk.finish(request_id, reason="cancelled")
        assert vars_of(self.desk.admission) == (0, 0, 0, 0)


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_rate_counts_only_the_time_in_which_there_was_work():
    rate = Rate()
    assert rate.per_second(0.0) is None
    for second in range(100):
        now = second * 50.0  # idle for 48 seconds each time
        rate.busy(now)
        rate.add(20, now + 1)
        rate.add(20, now + 2)
        rate.idle(now + 2)
    assert rate.per_second(10_000.0) == pytest.approx(20, rel=0.1)


# -- over a real engine's seam and a real server -----------------------------------------------------------------------


async def test_leases_end_with_their_streams_in_every_way_a_stream_can_end():
    info = fake_info(vocab_size=VOCAB, max_model_len=256, embedding_dim=3)
    engine = FakeEngine(info=info, max_live=4)
    engine.start()
    admission = Admission(info)
    tokenizer = CountingTokenizer(256)
    ends: list[Finished] = []
    async with TextStreams(engine, tokenizer) as streams:
        streams.observer = admission  # alone
        assert isinstance(streams.observer, Admission)
        work = prepared(3, 20)

        async def open_(*ids: str, **options: Any) -> None:
            with admission.admit(SOMEBODY, work, ids):
                await streams.open(
                    ids, work, sink=lambda events: ends.extend(e for e in events if isinstance(e, Finished)), **options
                )

        await open_("a", "b")
        await open_("c", credit=1)
        await eventually(lambda: len(ends) == 2)
        assert admission.leases == 1
        await streams.cancel("c")
        await eventually(lambda: len(ends) == 3)
        assert admission.leases == 0
        await open_("d", credit=1)
        with pytest.raises(OverloadedError):
            await open_("e", "f", "g", "h")
        assert admission.leases == 1
        await streams.cancel("d")
        await eventually(lambda: len(ends) == 4)
        await open_("late", credit=0, queue_timeout_s=0.0)
        await eventually(lambda: len(ends) == 5)
        assert (ends[-1].finish_reason, (ends[-1].error or ("",))[0]) == ("error", "deadline_exceeded")
        assert admission.leases == 0
        pooled = await streams.prepare_embedding([1, 2])
        with admission.admit(SOMEBODY, pooled, ["v"]):
            await streams.open(["v"], pooled, sink=ends.extend)  # type: ignore[arg-type]  # whatever comes
        await open_("lost", credit=1)
        await engine._batches.put(None)
        await eventually(lambda: not admission.leases)
        admission.check()
        assert admission.prefill_rate.per_second(asyncio.get_running_loop().time()) is None or admission.backlog_tokens == 0
    streams.observer = NullObserver()
    await engine.close()


BODY = {"model": "fake", "prompt": "abc", "max_tokens": 5}


async def test_a_quota_becomes_429_with_a_retry_after_that_is_true(tmp_path: Path):
    async with keyed(tmp_path, more="\n[quota]\nrequests_per_s = 0.5\n") as served:
        assert (await ask(served, "POST", "/v1/completions", bearer("acme"), BODY)).status == 200
        answer = await ask(served, "POST", "/v1/completions", bearer("acme"), BODY)
        assert (answer.status, answer.code) == (429, "rate_limited")
        assert int(answer.header("Retry-After") or 0) in (2, 3)
        assert (await ask(served, "POST", "/v1/completions", bearer("rival"), BODY)).status == 200


async def test_more_than_can_wait_becomes_429_with_retry_after():
    class Deaf(FakeEngine):
        """Takes everything and begins nothing."""

        async def submit(self, request: EngineRequest) -> None:
            self.taken = True

    async with serving(max_waiting=2) as served:
        served.streams.client.submit = Deaf().submit  # type: ignore[method-assign]  # for this server only
        waiting = [asyncio.create_task(ask(served, "POST", "/v1/completions", {}, BODY)) for _ in range(2)]
        await eventually(lambda: served.server.admission.waiting == 2)
        answer = await ask(served, "POST", "/v1/completions", {}, BODY)
        assert (answer.status, answer.code) == (429, "overloaded")
        assert int(answer.header("Retry-After") or 0) >= 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        served.streams._lose_all()
    assert served.server.admission.leases == 0


async def test_a_request_that_waited_too_long_ends_with_deadline_exceeded_and_was_never_begun():
    class Queue(FakeEngine):
        """Begins nothing; what has waited too long ends all the same."""

        def _step(self) -> list[StepOutput]:
            ended, self._ended = self._ended, []
            return ended

    async with serving(queue_timeout_s=0.01, engine=Queue(info=fake_info(vocab_size=VOCAB, max_model_len=256))) as served:  # type: ignore[arg-type]  # it holds everything
        answer = await ask(served, "POST", "/v1/completions", {}, BODY)
        assert (answer.status, answer.code) == (504, "deadline_exceeded")
        body = json.dumps(BODY | {"stream": True})
        streamed = await ask(served, "POST", "/v1/completions", {}, body.encode())
        assert b"deadline_exceeded" in streamed.body
        assert served.server.admission.leases == 0
        assert not served.engine._live


def test_what_one_step_can_compute_is_never_refused_for_the_backlog():
    """A rate seen in one slow first step used to turn the next sixty short prompts away."""
    desk = Desk(slo_ttft_s=0.01)
    desk.admission._info = msgspec.structs.replace(fake_info(), max_num_batched_tokens=500)
    busy(desk, rate=1.0)
    for _ in range(5):
        desk.admit(100)
    desk.refused(OverloadedError, tokens=100)


def test_once_all_places_are_taken_they_are_what_people_wait_for():
    """The prefill rate promised places that nobody left in time: most of what was let in came too late."""
    desk = Desk(slo_ttft_s=5.0)
    desk.admission._info = msgspec.structs.replace(desk.admission._info, max_num_seqs=2)
    for _ in range(20):  # each is ten seconds in its place, so that a place comes free every five
        (request_id,) = desk.admit(10)
        desk.begin(request_id)
        desk.now += 0.1
        desk.first_token(request_id)
        desk.now += 10.0
        desk.finish(request_id)
    for _ in range(2):
        desk.admit(10)
    after = desk.refused(OverloadedError, tokens=10)
    assert after > 0

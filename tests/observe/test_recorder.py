"""What the recorder books, against a model that keeps every time of every stream."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.engine.api import StepBatch, StepOutput
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.observe.recorder import NullRecorder, Recorder
from streamkv.sampling_params import Sampling
from streamkv.text.events import Finished, Timings, Why
from streamkv.text.stream import PreparedPrompt

PREPARED = PreparedPrompt([1, 2, 3], Sampling(max_tokens=7))


def recorder() -> Recorder:
    return Recorder(fake_info())


def end(name: str, tokens: int = 5, reason: str = "length", **why: object) -> Finished:
    return Finished(name, reason, 3, tokens, 0, Timings(0.5, 0.25, 0.75, 2.0), why=Why(**({"chunks": 1} | why)))  # type: ignore[arg-type]  # a literal


def tokens(*names: str, at: float, **states: str) -> StepBatch:
    return StepBatch([StepOutput(name, (1,), states.get(name)) for name in names], at)  # type: ignore[arg-type]  # a literal


def active(booked: Recorder) -> dict[str, float]:
    return {state: value for (state,), value in booked.metrics.streams.values.items() if value}


def bucket(value: float, bounds: tuple[float, ...]) -> int:
    return next((index for index, bound in enumerate(bounds) if value <= bound), len(bounds))


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["open", "step", "step", "step", "end"]),
        st.sets(st.sampled_from("abcdef")),
        st.sampled_from([0.004, 0.02, 0.3, 2.0]),
    ),
    max_size=40,
)


@given(MOVES)
def test_every_wait_for_a_token_is_booked_once(moves: list[tuple[str, set[str], float]]):
    booked, now = recorder(), 100.0
    opened: dict[str, float] = {}
    last: dict[str, float] = {}
    first: Counter[int] = Counter()
    between: Counter[int] = Counter()
    for kind, names, seconds in moves:
        now += seconds
        if kind == "open":
            fresh = sorted(names - opened.keys())
            if fresh:
                booked.opened(fresh, PREPARED, "", now)
            opened |= dict.fromkeys(fresh, now)
        elif kind == "step":
            # Tokens of streams that have ended here come too: the engine learns of a stop string later.
            booked.batch(tokens(*sorted(names), at=now))
            for name in names & opened.keys():
                if name in last:
                    between[bucket(now - last[name], booked.metrics.itl.bounds)] += 1
                else:
                    first[bucket(now - opened[name], booked.metrics.ttft.bounds)] += 1
                last[name] = now
        else:
            for name in names & opened.keys():
                booked.finished(end(name), now)
                del opened[name]
                last.pop(name, None)
        assert sum(active(booked).values()) == len(opened)
    assert {index: count for index, count in enumerate(booked.metrics.itl.counts) if count} == between
    assert {index: count for index, count in enumerate(booked.metrics.ttft.counts) if count} == first


def test_states_follow_the_streams():
    booked = recorder()
    booked.opened(["a", "b"], PREPARED, "", 0.0)
    booked.opened(["c"], PREPARED, "", 0.0)
    assert active(booked) == {"queued": 3}
    booked.batch(StepBatch([StepOutput("a", state="prefill"), StepOutput("b", state="prefill")], 1.0))
    assert active(booked) == {"queued": 1, "prefill": 2}
    booked.batch(tokens("a", "b", at=2.0, a="decode", b="stalled"))
    assert active(booked) == {"queued": 1, "decode": 1, "stalled": 1}
    booked.batch(tokens("a", "b", at=3.0))
    assert active(booked) == {"queued": 1, "decode": 2}, "credit came in time for the next step"
    booked.batch(StepBatch([StepOutput("b", state="preempted"), StepOutput("a", (1,))], 4.0))
    assert active(booked) == {"queued": 1, "decode": 1, "preempted": 1}
    booked.refused(["c"])
    booked.finished(end("a"), 5.0)
    booked.finished(end("b", reason="cancelled"), 5.0)
    assert active(booked) == {}
    assert booked.metrics.success.values == {("stop",): 0, ("length",): 1, ("abort",): 1, ("error",): 0}


def test_a_stream_is_booked_with_all_that_is_known_of_it():
    booked = recorder()
    booked.opened(["a"], PREPARED, "", 10.0)
    booked.finished(end("a", stalled=1.5, preempted=0.5, miss="differs", miss_at=2, chunks=3), 14.0)
    metrics = booked.metrics
    sums = {name: getattr(metrics, name).sum for name in ("e2e", "queue", "prefill", "decode", "inference", "tpot", "chunks")}
    assert sums == {"e2e": 4.0, "queue": 0.5, "prefill": 0.25, "decode": 2.0, "inference": 2.25, "tpot": 0.5, "chunks": 3}
    assert (metrics.request_prompt.sum, metrics.request_generated.sum, metrics.request_wanted.sum) == (3, 5, 7)
    assert (metrics.stalled.values[()], metrics.preempted.values[()], metrics.misses.values["differs",]) == (1.5, 0.5, 1)


def test_who_never_began_has_no_times():
    booked = recorder()
    booked.opened(["a"], PREPARED, "", 10.0)
    booked.finished(end("a", 0, "cancelled", chunks=0), 11.0)
    assert sum(booked.metrics.queue.counts) == sum(booked.metrics.tpot.counts) == 0
    assert sum(booked.metrics.e2e.counts) == 1


def test_an_unknown_stream_is_nobodys():
    booked = recorder()
    event = end("never seen")
    assert booked.finished(event, 1.0) is event
    booked.refused(["neither"])
    assert active(booked) == {}


async def test_a_late_loop_is_told_to_the_streams_that_lived_then():
    loop = asyncio.get_running_loop()
    booked = recorder()
    booked.lag.start()
    try:
        booked.opened(["before"], PREPARED, "", 0.0)
        due = loop.time() + 0.2
        while loop.time() < due:
            pass  # nobody else gets a turn
        late = booked.finished(end("before"), 1.0).why.lag
        assert late > 0.1, "a call that is overdue counts"
        await asyncio.sleep(0)
        booked.opened(["after"], PREPARED, "", 0.0)
        assert booked.finished(end("after"), 1.0).why.lag < late
    finally:
        booked.lag.stop()


@pytest.mark.parametrize("calls", [Recorder(fake_info()), NullRecorder()], ids=["recorder", "null"])
def test_sockets_and_doors_have_their_calls(calls: NullRecorder):
    calls.connected()
    calls.disconnected(3.0)
    calls.slow_consumer()
    calls.resumed(40)
    calls.resume_gone()
    calls.orphaned(7)
    calls.frame(8, 0.0001)
    calls.rejected("blocks")
    calls.http("/v1/models", "GET", 404, 0.5)
    calls.http("/v1/stream", "GET", 101, 3600.0)
    if isinstance(calls, Recorder):
        metrics = calls.metrics
        assert (metrics.sockets.values[()], metrics.sockets_opened.values[()], metrics.slow.values[()]) == (0, 1, 1)
        assert metrics.resumes.values == {("resumed",): 1, ("gone",): 1}
        assert (metrics.replayed.values[()], metrics.orphans.values[()], metrics.frame_tokens.sum) == (40, 7, 8)
        assert metrics.rejects.values["blocks",] == 1
        assert metrics.http.values == {("/v1/models", "GET", "4xx"): 1, ("/v1/stream", "GET", "1xx"): 1}
        assert metrics.http_seconds.values == {("/v1/models", "GET"): (0.5, 1)}


async def test_what_the_engine_counts_is_taken_over():
    engine, booked = FakeEngine(), recorder()
    booked.outbound = lambda: 77
    booked.sample(await engine.stats(), await engine.kv_map())
    metrics = booked.metrics
    assert metrics.blocks.values == {("free",): 1024, ("cached",): 0, ("used",): 0, ("fenced",): 0}
    assert (metrics.kv_usage.values[()], metrics.waste.values[()], metrics.outbound.values[()]) == (0, 0, 77)
    assert metrics.resident.values[()] > 1 << 20

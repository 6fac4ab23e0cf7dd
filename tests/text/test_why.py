"""What a stream's last event says about its life: the waits, the prompt's steps, the cache's miss."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.engine.api import StepBatch, StepOutput
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.errors import OverloadedError
from streamkv.sampling_params import Sampling
from streamkv.text.events import Finished, StreamEvent, Why
from streamkv.text.observer import NullObserver
from streamkv.text.stream import PreparedPrompt, TextStream
from streamkv.text.streams import TextStreams
from streamkv.text.waits import Waits
from tests.server.serving import VOCAB, CountingTokenizer, eventually

TOKENIZER = CountingTokenizer(256)


def why(*outputs: tuple[float, StepOutput], stop: tuple[str, ...] = ()) -> Why:
    """Of a stream submitted at 0 that the engine tells this about."""
    prepared = PreparedPrompt([65] * 9, Sampling(max_tokens=99), stop=stop)
    stream, events = TextStream("a", prepared, TOKENIZER, lambda _events: None, 0.0), list[StreamEvent]()
    for at, output in outputs:
        stream.take(output, at, events)
    last = events[-1]
    assert isinstance(last, Finished)
    return last.why


def token(**fields: Any) -> StepOutput:
    return StepOutput("a", (97,), **fields)


def state(name: Any, **fields: Any) -> StepOutput:
    return StepOutput("a", state=name, **fields)


def test_a_plain_life():
    said = why(
        (1, state("prefill", cached=4, miss="differs")), (2, token(state="decode", chunks=3)), (3, token(finish_reason="length"))
    )
    assert said == Why(chunks=3, miss="differs", miss_at=4)


def test_nothing_missed_is_nowhere():
    assert why((1, state("prefill", cached=8)), (2, token(state="decode", chunks=1, finish_reason="stop"))) == Why(chunks=1)


def test_a_request_that_generates_nothing_tells_its_steps_with_its_end():
    assert why((1, state("prefill", cached=0, miss="off")), (4, StepOutput("a", finish_reason="length", chunks=4))).chunks == 4


def test_time_without_credit_lasts_to_the_next_token():
    said = why(
        (1, token(state="stalled", chunks=1)), (4, token()), (5, token(state="stalled")), (7.5, token(finish_reason="length"))
    )
    assert (said.stalled, said.preempted, said.preemptions) == (5.5, 0, 0)


def test_time_lost_to_others_holds_the_computing_again():
    said = why(
        *((0, state("prefill", cached=8)), (1, token(state="decode", chunks=1)), (2, state("preempted"))),
        *((5, state("prefill", cached=0, miss="evicted")), (6, token()), (7, token(finish_reason="length"))),
    )
    assert (said.preemptions, said.preempted, said.stalled) == (1, 4, 0)
    assert said.miss is None, "of the first admission"


def test_who_is_preempted_while_it_waits_for_its_reader_lost_nothing_to_others():
    said = why((1, token(state="stalled", chunks=1)), (2, state("preempted")), (9, token(finish_reason="length")))
    assert (said.preemptions, said.preempted, said.stalled) == (1, 0, 8)


def test_a_wait_that_nothing_ends_lasts_to_the_end():
    assert why((1, token(state="stalled", chunks=1)), (6, StepOutput("a", finish_reason="cancelled"))).stalled == 5


def test_a_stop_string_ends_it_with_what_is_known():
    said = why((1, state("prefill", cached=2, miss="not_cached")), (2, token(state="decode", chunks=2)), stop=("a",))
    assert said == Why(chunks=2, miss="not_cached", miss_at=2)


@given(st.lists(st.tuples(st.sampled_from(["stalled", "preempted", None]), st.floats(0, 9))))
def test_waits_are_never_longer_than_the_time(moves: list[tuple[Any, float]]):
    waits, now = Waits(), 0.0
    for kind, seconds in moves:
        now += seconds
        waits.begin(kind, now) if kind else waits.end(now)
        assert 0 <= waits.stalled + waits.preempted <= now
    assert waits.preemptions == sum(kind == "preempted" for kind, _ in moves)


class Notes(NullObserver):
    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []

    def opened(self, ids: Any, prepared: PreparedPrompt, salt: str, now: float) -> None:
        self.notes.append(("opened", (tuple(ids), salt)))

    def refused(self, ids: Any) -> None:
        self.notes.append(("refused", tuple(ids)))

    def batch(self, batch: StepBatch) -> None:
        self.notes.append(("batch", len(batch.outputs)))

    def finished(self, event: Finished, now: float) -> Finished:
        self.notes.append(("finished", event.id))
        return Finished(event.id, event.finish_reason, 1, 2, 3, event.timings, why=Why(lag=0.5))


async def test_an_observer_hears_of_every_stream_once_and_may_add_to_its_last_event():
    engine, notes, events = FakeEngine(info=fake_info(vocab_size=VOCAB), max_live=2), Notes(), list[StreamEvent]()
    engine.start()
    async with TextStreams(engine, TOKENIZER, observer=notes) as streams:
        prepared = PreparedPrompt([65], Sampling(max_tokens=2))
        await streams.open(["a", "b"], prepared, sink=events.extend, salt="acme")
        with pytest.raises(OverloadedError):
            await streams.open(["c"], prepared, sink=events.extend)
        await eventually(lambda: not streams.num_open)
        await streams.open(["lost"], prepared, sink=events.extend, credit=1)
        await engine.close()
        await eventually(lambda: not streams.alive)
    kinds = [kind for kind, _ in notes.notes]
    assert notes.notes[0] == ("opened", (("a", "b"), "acme"))
    assert [(kind, what) for kind, what in notes.notes if kind == "refused"] == [("refused", ("c",))]
    assert sorted(what for kind, what in notes.notes if kind == "finished") == ["a", "b", "lost"]
    assert kinds.count("batch") >= 3
    assert [event.why.lag for event in events if isinstance(event, Finished)] == [0.5] * 3

"""What `EngineClient` promises, asked of every engine: the fake that others test with, and the real one over integers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest

from streamkv.engine.api import EngineClient, EngineInfo, EngineRequest, EngineStats, FinishReason, StepBatch
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.errors import ContextLengthError, DrainingError, InvalidRequestError, OverloadedError
from streamkv.sampling_params import POOLINGS, Pooling, Sampling
from tests.core.model import VOCAB
from tests.engine.driving import DEADLINE_S, Collected, Reader, run_all
from tests.engine.integers import ask, integer_engine

MAX_MODEL_LEN, CAPACITY = 128, 9
PROMPT = [1, 2, 3, 4, 5]

Start = Callable[[], AbstractAsyncContextManager[EngineClient]]


@asynccontextmanager
async def fake() -> AsyncIterator[EngineClient]:
    engine = FakeEngine(info=fake_info(vocab_size=VOCAB, max_model_len=MAX_MODEL_LEN, embedding_dim=1), max_live=CAPACITY)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def real(**options: Any) -> AsyncIterator[EngineClient]:
    async with integer_engine(max_model_len=MAX_MODEL_LEN, max_queued_requests=CAPACITY, **options) as (engine, _):
        yield engine


@asynccontextmanager
async def synchronous() -> AsyncIterator[EngineClient]:
    async with real(look_ahead=False) as engine:
        yield engine


@pytest.fixture(params=[fake, real, synchronous], ids=lambda start: start.__name__)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    """A running engine with a vocabulary of 7, a context of 128 and room for 9 requests."""
    start: Start = request.param
    async with start() as running:
        yield running


def check_stream(collected: Collected) -> None:
    """The order of one request's outputs: state, then tokens, then one last output."""
    *before, last = collected.outputs
    assert last.finish_reason is not None
    assert all(output.finish_reason is None for output in before)
    states = collected.states
    if collected.tokens:
        assert states[:2] == ["prefill", "decode"]
        first = next(output for output in collected.outputs if output.token_ids)
        assert first.state == "decode", "the first token and its state come together"
    else:
        assert "decode" not in states
    for output in collected.outputs:
        assert output.cached is None or output.state == "prefill", "cached comes with that state"
        assert output.error is None or output.finish_reason == "error"


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_every_id_gets_its_outputs_in_order_and_exactly_one_last(engine: EngineClient) -> None:
    requests = [ask("a", PROMPT, 6), ask("b", [3], 1), ask("c", PROMPT[:2], 9, n=3)]
    collected = await run_all(engine, requests)
    assert {name: len(one.tokens) for name, one in collected.items()} == {"a": 6, "b": 1, "c/0": 9, "c/1": 9, "c/2": 9}
    for one in collected.values():
        check_stream(one)
        assert one.last.finish_reason == "length"
        assert all(0 <= token < VOCAB for token in one.tokens)


async def test_the_same_request_has_the_same_tokens_alone_and_among_others(engine: EngineClient) -> None:
    (alone,) = (await run_all(engine, [ask("x", PROMPT, 12)])).values()
    among = await run_all(engine, [ask(name, PROMPT, 12) for name in ("a", "x", "b")])
    assert among["x"].tokens == alone.tokens


@pytest.mark.parametrize("max_tokens", [1, 2, MAX_MODEL_LEN - len(PROMPT)])
async def test_max_tokens_is_kept_to_the_token(engine: EngineClient, max_tokens: int) -> None:
    (one,) = (await run_all(engine, [ask("a", PROMPT, max_tokens)])).values()
    assert (len(one.tokens), one.last.finish_reason) == (max_tokens, "length")


async def test_a_stop_token_ends_the_output_and_is_its_last_token(engine: EngineClient) -> None:
    (free,) = (await run_all(engine, [ask("free", PROMPT, 20)])).values()
    for stop in set(free.tokens):
        end = free.tokens.index(stop) + 1
        request = EngineRequest((f"s{stop}",), PROMPT, Sampling(max_tokens=20, stop_token_ids=(stop,)))
        (one,) = (await run_all(engine, [request])).values()
        assert one.tokens == free.tokens[:end]
        assert one.last.finish_reason == "stop"
        assert one.last.token_ids[-1:] == (stop,), "it comes with the last output"


async def test_stop_wins_over_length_when_both_come_with_the_same_token(engine: EngineClient) -> None:
    (free,) = (await run_all(engine, [ask("free", PROMPT, 1)])).values()
    request = EngineRequest(("both",), PROMPT, Sampling(max_tokens=1, stop_token_ids=(free.tokens[0],)))
    (one,) = (await run_all(engine, [request])).values()
    assert one.last.finish_reason == "stop"


async def test_no_stop_token_ends_a_request_before_its_min_tokens(engine: EngineClient) -> None:
    request = EngineRequest(("a",), PROMPT, Sampling(max_tokens=20, stop_token_ids=tuple(range(VOCAB)), min_tokens=7))
    (one,) = (await run_all(engine, [request])).values()
    assert (len(one.tokens), one.last.finish_reason) == (8, "stop")


# -- what is wanted of the prompt --------------------------------------------------------------------------------------


async def test_a_request_that_generates_nothing_ends_without_a_token(engine: EngineClient) -> None:
    collected = await run_all(engine, [ask("none", PROMPT * 12, 0), ask("some", PROMPT, 3)])
    check_stream(collected["none"])
    assert (collected["none"].tokens, collected["none"].last.finish_reason) == ([], "length")
    assert len(collected["some"].tokens) == 3


@pytest.mark.parametrize(("length", "max_tokens"), [(1, 2), (2, 0), (5, 3), (100, 0), (100, 4)])
async def test_every_prompt_token_but_the_first_is_scored_once_before_any_output(
    engine: EngineClient, length: int, max_tokens: int
) -> None:
    prompt = (PROMPT * 20)[:length]
    wanted = EngineRequest(("a",), prompt, Sampling(max_tokens=max_tokens, prompt_logprobs=0))
    collected = await run_all(engine, [wanted, ask("beside", PROMPT, 9)])
    outputs = collected["a"].outputs
    check_stream(collected["a"])
    scored = [output for output in outputs if output.prompt_logprobs is not None]
    positions = [
        output.prompt_logprobs.start + index  # type: ignore[union-attr]  # filtered above
        for output in scored
        for index in range(len(output.prompt_logprobs.entries))  # type: ignore[union-attr]  # as above
    ]
    assert positions == list(range(1, length))
    first_token = next((index for index, output in enumerate(outputs) if output.token_ids), len(outputs) - 1)
    assert all(outputs.index(output) <= first_token for output in scored)


async def test_samples_of_one_prompt_score_it_once(engine: EngineClient) -> None:
    collected = await run_all(engine, [EngineRequest(("a", "b"), PROMPT, Sampling(max_tokens=2, prompt_logprobs=0))])
    scored = [name for name, one in collected.items() if any(output.prompt_logprobs is not None for output in one.outputs)]
    assert scored == ["a"]


@pytest.mark.parametrize("pooling", POOLINGS)
async def test_an_embedding_comes_with_the_last_output(engine: EngineClient, pooling: Pooling) -> None:
    collected = await run_all(engine, [ask("a", PROMPT * 12, 0, pooling=pooling), ask("beside", PROMPT, 9)])
    *before, last = collected["a"].outputs
    assert len(last.embedding or b"") == 4 * engine.describe().embedding_dim
    assert all(output.embedding is None for output in before)
    assert collected["a"].tokens == []


# -- forks ------------------------------------------------------------------------------------------------------------


async def test_a_fork_goes_on_from_its_parents_tokens_and_leaves_the_parent_alone(engine: EngineClient) -> None:
    (alone,) = (await run_all(engine, [ask("alone", PROMPT, 12)])).values()
    reader = Reader(engine)
    await engine.submit(ask("parent", PROMPT, 12, credit=6))
    await reader.tokens("parent", 6)
    so_far = [*PROMPT, *reader.requests["parent"].tokens[:4]]
    fork = EngineRequest(("fork/1", "fork/2"), so_far, Sampling(max_tokens=5), fork_of="parent", first_branch=1)
    await engine.submit(fork)
    await engine.submit(EngineRequest(("orphan",), so_far, Sampling(max_tokens=2), fork_of="nobody"))
    collected = await reader.finished(["fork/1", "fork/2", "orphan"])
    await engine.credit("parent", 12)
    (parent,) = (await reader.finished(["parent"])).values()
    assert parent.tokens == alone.tokens
    assert [len(collected[name].tokens) for name in ("fork/1", "fork/2", "orphan")] == [5, 5, 2]
    for one in collected.values():
        check_stream(one)


# -- cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["cancelled", "stop", "error"])
async def test_cancel_before_the_first_step_yields_only_a_last_output(engine: EngineClient, reason: FinishReason) -> None:
    reader = Reader(engine)
    await engine.submit(ask("a", PROMPT, 50))
    await engine.cancel("a", reason)
    (one,) = (await reader.finished(["a"])).values()
    assert one.tokens == []
    assert one.last.finish_reason == reason


async def test_cancel_while_tokens_flow_drops_what_comes_later(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("a", PROMPT, 120))
    await engine.submit(ask("other", PROMPT, 30))
    await reader.tokens("a", 3)
    await engine.cancel("a", "stop")
    collected = await reader.finished(["a", "other"])
    check_stream(collected["a"])
    assert collected["a"].last.finish_reason == "stop"
    assert collected["a"].last.token_ids == ()
    assert len(collected["other"].tokens) == 30, "the others do not notice"
    assert (await engine.stats()).running == 0


@pytest.mark.parametrize("credit", [0, 3])
async def test_cancel_of_a_parked_request(engine: EngineClient, credit: int) -> None:
    reader = Reader(engine)
    await engine.submit(ask("parked", PROMPT, 50, credit=credit))
    await reader.tokens("parked", credit) if credit else None
    await engine.cancel("parked")
    (one,) = (await reader.finished(["parked"])).values()
    assert (len(one.tokens), one.last.finish_reason) == (credit, "cancelled")
    assert (await engine.stats()).blocks_used == 0


async def test_cancel_of_one_sample_leaves_its_siblings(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("s", PROMPT, 40, n=3))
    await reader.tokens("s/0", 2)
    await engine.cancel("s/0")
    collected = await reader.finished(["s/0", "s/1", "s/2"])
    assert [collected[f"s/{i}"].last.finish_reason for i in range(3)] == ["cancelled", "length", "length"]
    assert len(collected["s/1"].tokens) == len(collected["s/2"].tokens) == 40


async def test_cancel_of_unknown_and_finished_ids_is_ignored(engine: EngineClient) -> None:
    reader = Reader(engine)  # fails on an output after the last one
    await engine.cancel("nobody")
    await engine.submit(ask("a", PROMPT, 2))
    await reader.finished(["a"])
    await engine.cancel("a")
    await engine.cancel("a", "error")
    await engine.submit(ask("b", PROMPT, 2))
    await engine.cancel("b")
    await engine.cancel("b", "stop")
    collected = await reader.finished(["a", "b"])
    await engine.submit(ask("c", PROMPT, 2))
    await reader.finished(["c"])
    assert collected["b"].last.finish_reason == "cancelled", "the first reason stands"
    assert set(reader.requests) == {"a", "b", "c"}


async def test_an_id_is_free_again_after_its_last_output(engine: EngineClient) -> None:
    first = (await run_all(engine, [ask("a", PROMPT, 3)]))["a"]
    second = (await run_all(engine, [ask("a", PROMPT, 3)]))["a"]
    assert first.tokens == second.tokens


async def test_an_id_cancelled_this_moment_is_refused_or_comes_out_as_two_whole_streams(engine: EngineClient) -> None:
    outputs: list[Any] = []
    enough = asyncio.Event()
    wanted = 1

    async def read() -> None:
        async for batch in engine.steps():
            outputs.extend(output for output in batch.outputs if output.id == "a")
            if sum(output.finish_reason is not None for output in outputs) >= wanted:
                enough.set()

    reading = asyncio.create_task(read())
    await engine.submit(ask("a", PROMPT, 50))
    await engine.cancel("a")
    try:
        await engine.submit(ask("a", PROMPT, 2))
    except InvalidRequestError:
        pass
    else:
        wanted = 2
    async with asyncio.timeout(DEADLINE_S):
        await enough.wait()
    reading.cancel()
    reasons = [output.finish_reason for output in outputs]
    first = reasons.index("cancelled")
    check_stream(Collected(outputs[: first + 1]))
    assert sum(len(output.token_ids) for output in outputs[: first + 1]) == 0
    if wanted == 2:
        check_stream(Collected(outputs[first + 1 :]))
        assert reasons[-1] == "length"


# -- credit -----------------------------------------------------------------------------------------------------------


async def test_credit_is_an_exact_bound_that_parks_and_wakes(engine: EngineClient) -> None:
    (free,) = (await run_all(engine, [ask("free", PROMPT, 12)])).values()
    reader = Reader(engine)
    await engine.submit(ask("slow", PROMPT, 12, credit=2))
    for limit, grant in ((2, 5), (5, 12)):
        await reader.tokens("slow", limit)
        await run_to_rest(engine, reader)
        assert len(reader.requests["slow"].tokens) == limit
        await engine.credit("slow", grant)
        await engine.credit("slow", 1)  # lower: ignored
    (one,) = (await reader.finished(["slow"])).values()
    assert one.tokens == free.tokens
    check_stream(one)


async def test_no_credit_at_all_computes_nothing_until_there_is_some(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("none", PROMPT, 3, credit=0))
    await run_to_rest(engine, reader)
    assert not reader.requests.get("none", Collected()).tokens
    await engine.credit("none", 3)
    (one,) = (await reader.finished(["none"])).values()
    assert len(one.tokens) == 3


async def test_credit_for_nobody_the_finished_and_the_unlimited_is_ignored(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.credit("nobody", 5)
    await engine.submit(ask("a", PROMPT, 6))
    await engine.credit("a", 1)
    (one,) = (await reader.finished(["a"])).values()
    await engine.credit("a", 9)
    assert len(one.tokens) == 6


async def run_to_rest(engine: EngineClient, reader: Reader) -> None:
    """Let the engine step many times: another request's 40 tokens, so that whoever could go on has done so."""
    name = f"clock{len(reader.requests)}"
    await engine.submit(ask(name, [6, 6], 40))
    await reader.finished([name])


# -- too late ---------------------------------------------------------------------------------------------------------


async def test_what_has_waited_too_long_ends_though_nothing_is_computed(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("late", PROMPT, 5, n=2, credit=0, queue_timeout_s=0.02))
    await engine.submit(ask("at once", PROMPT, 5, queue_timeout_s=0.0))
    collected = await reader.finished(["late/0", "late/1", "at once"])
    for one in collected.values():
        (only,) = one.outputs
        assert (only.finish_reason, (only.error or ("",))[0]) == ("error", "deadline_exceeded")
    stats = await engine.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    await engine.drain(DEADLINE_S)


async def test_what_has_begun_is_not_too_late(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("a", PROMPT, 20, credit=1, queue_timeout_s=0.1))
    await reader.tokens("a", 1)
    await engine.submit(ask("clock", PROMPT, 5, credit=0, queue_timeout_s=0.2))
    await reader.finished(["clock"])
    await engine.credit("a", 20)
    collected = await reader.finished(["a"])
    assert (len(collected["a"].tokens), collected["a"].last.finish_reason) == (20, "length")


# -- refusals ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[EngineRequest, type[Exception]]] = {
    "no ids": (EngineRequest((), PROMPT, Sampling(max_tokens=1)), InvalidRequestError),
    "duplicate ids": (EngineRequest(("d", "d"), PROMPT, Sampling(max_tokens=1)), InvalidRequestError),
    "id in use": (ask("used", PROMPT, 1), InvalidRequestError),
    "one of its ids in use": (EngineRequest(("new", "used"), PROMPT, Sampling(max_tokens=1)), InvalidRequestError),
    "empty prompt": (ask("x", [], 1), InvalidRequestError),
    "token id out of range": (ask("x", [0, VOCAB], 1), InvalidRequestError),
    "huge token id": (ask("x", [0, 2**70], 1), InvalidRequestError),
    "negative token id": (ask("x", [0, -1, 1], 1), InvalidRequestError),
    "fewer than no tokens wanted": (ask("x", PROMPT, -1), InvalidRequestError),
    "an embedding that generates": (ask("x", PROMPT, 1, pooling="mean"), InvalidRequestError),
    "an embedding of several samples": (ask("x", PROMPT, 0, n=2, pooling="mean"), InvalidRequestError),
    "an embedding with scores": (
        EngineRequest(("x",), PROMPT, Sampling(max_tokens=0, prompt_logprobs=0), pooling="last"),
        InvalidRequestError,
    ),
    "a logits processor that is not enabled": (
        EngineRequest(("x",), PROMPT, Sampling(max_tokens=1, processors=(("unknown", None),))),
        InvalidRequestError,
    ),
    "one token too long": (ask("x", PROMPT, MAX_MODEL_LEN - len(PROMPT) + 1), ContextLengthError),
    "prompt too long": (ask("x", [1] * (MAX_MODEL_LEN + 1), 1), ContextLengthError),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_can_never_be_served_is_refused_before_queueing(engine: EngineClient, name: str) -> None:
    bad, error = BAD[name]
    reader = Reader(engine)
    await engine.submit(ask("used", PROMPT, 30, credit=1))
    before = await engine.stats()
    with pytest.raises(error) as caught:
        await engine.submit(bad)
    assert caught.value.message.strip(), "one sentence for the user"  # type: ignore[attr-defined]  # a StreamKVError
    after = await engine.stats()
    assert (after.waiting + after.running, after.prompt_tokens) == (before.waiting + before.running, before.prompt_tokens)
    await engine.credit("used", 30)
    await reader.finished(["used"])
    assert set(reader.requests) == {"used"}, "who was refused gets no output"


async def test_too_many_requests_are_overload_and_room_comes_back(engine: EngineClient) -> None:
    reader = Reader(engine)
    for index in range(CAPACITY):
        await engine.submit(ask(f"q{index}", PROMPT, 5, credit=0))
    with pytest.raises(OverloadedError):
        await engine.submit(ask("more", PROMPT, 5))
    await engine.cancel("q0")
    await engine.cancel("q1")
    with pytest.raises(OverloadedError):
        await engine.submit(ask("three", PROMPT, 5, n=3, credit=0))  # all or none
    await engine.submit(ask("two", PROMPT, 5, n=2))
    collected = await reader.finished(["two/0", "two/1", "q0", "q1"])
    assert collected["two/1"].last.finish_reason == "length"
    assert "more" not in reader.requests


# -- messages ---------------------------------------------------------------------------------------------------------


async def test_everything_that_crosses_the_seam_survives_msgpack(engine: EngineClient) -> None:
    def round_trip(value: Any) -> Any:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))

    batches: list[StepBatch] = []
    done = asyncio.Event()

    async def read() -> None:
        async for batch in engine.steps():
            batches.append(batch)
            if any(output.finish_reason == "length" for output in batch.outputs):
                done.set()

    reading = asyncio.create_task(read())
    requests = [ask("stopped", PROMPT, 40, credit=0), ask("a", PROMPT, 4, priority=3, salt="s", use_cache=False, credit=8)]
    for request in requests:
        assert round_trip(request) == request
        await engine.submit(round_trip(request))
    await engine.cancel("stopped", "error")
    async with asyncio.timeout(DEADLINE_S):
        await done.wait()
    reading.cancel()
    assert batches
    for message in [*batches, engine.describe(), await engine.stats()]:
        assert round_trip(message) == message
    assert isinstance(engine.describe(), EngineInfo)


async def test_batches_are_not_empty_and_their_clock_never_goes_back(engine: EngineClient) -> None:
    await engine.submit(ask("a", PROMPT, 20))
    await engine.drain(DEADLINE_S)
    await engine.close()
    async with asyncio.timeout(DEADLINE_S):
        batches = [batch async for batch in engine.steps()]
    assert all(batch.outputs for batch in batches)
    times = [batch.at for batch in batches]
    assert times == sorted(times)


# -- drain, close, stats ----------------------------------------------------------------------------------------------


async def test_drain_waits_for_what_runs_and_refuses_what_is_new(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("a", PROMPT, 40))
    draining = asyncio.create_task(engine.drain(DEADLINE_S))
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await engine.submit(ask("late", PROMPT, 1))
    assert await draining
    (one,) = (await reader.finished(["a"])).values()
    assert (len(one.tokens), one.last.finish_reason) == (40, "length")
    assert "late" not in reader.requests


async def test_drain_cancels_what_does_not_end_in_time(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("parked", PROMPT, 40, credit=1))
    await reader.tokens("parked", 1)
    assert not await engine.drain(0.01)
    (one,) = (await reader.finished(["parked"])).values()
    assert (len(one.tokens), one.last.finish_reason) == (1, "cancelled")


async def test_an_idle_engine_has_drained_at_once(engine: EngineClient) -> None:
    assert await engine.drain(DEADLINE_S)
    assert await engine.drain(0.0), "and again"


async def test_close_ends_every_request_and_then_the_steps(engine: EngineClient) -> None:
    reader = Reader(engine)
    await engine.submit(ask("done", PROMPT, 1))
    await reader.finished(["done"])
    await engine.submit(ask("runs", PROMPT, 120))
    await reader.tokens("runs", 2)
    await engine.submit(ask("parked", PROMPT, 50, credit=0))
    await engine.submit(ask("new", PROMPT, 50))
    await engine.close()
    await reader.ended()
    for name in ("runs", "parked", "new"):
        one = reader.requests[name]
        assert one.last.finish_reason in ("cancelled", "length"), name
        check_stream(one)
    assert reader.requests["parked"].last.finish_reason == "cancelled"
    assert set(reader.requests) == {"done", "runs", "parked", "new"}
    with pytest.raises(DrainingError):
        await engine.submit(ask("late", PROMPT, 1))
    await engine.close()  # once more does nothing


async def test_close_reaches_a_consumer_that_comes_late(engine: EngineClient) -> None:
    await engine.submit(ask("a", PROMPT, 120, credit=0))
    await engine.close()
    reader = Reader(engine)
    await reader.ended()
    assert reader.requests["a"].last.finish_reason == "cancelled"


async def test_stats_add_up_at_every_moment(engine: EngineClient) -> None:
    reader = Reader(engine)
    info = engine.describe()

    async def look() -> EngineStats:
        stats = await engine.stats()
        assert stats.blocks_free + stats.blocks_cached + stats.blocks_used == info.num_blocks
        assert min(stats.waiting, stats.running, stats.blocks_free, stats.blocks_cached, stats.blocks_used) >= 0
        return stats

    assert (await look()).running == 0
    for index in range(5):
        await engine.submit(ask(f"r{index}", PROMPT, 10, credit=3))
    assert (await look()).waiting + (await look()).running == 5
    await reader.tokens("r4", 3)
    await look()
    for index in range(5):
        await engine.credit(f"r{index}", 10)
    await reader.finished([f"r{index}" for index in range(5)])
    end = await look()
    assert (end.waiting, end.running, end.blocks_used) == (0, 0, 0)
    assert (end.prompt_tokens, end.output_tokens) == (25, 50)
    assert 0 <= end.cached_tokens <= end.prompt_tokens
    assert end.steps >= 10

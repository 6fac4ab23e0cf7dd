"""The hub between token ids and text: checks first, one call per reader and batch, exactly one last event whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamkv.engine.api import EngineRequest, StepBatch
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.errors import ContextLengthError, DrainingError, InvalidRequestError, OverloadedError, StreamKVError
from streamkv.sampling_params import SamplingParams
from streamkv.text.detokenizer import byte_level_alphabet
from streamkv.text.events import Delta, Finished, Status, StreamEvent
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer
from tests.text.kinds import raw, text_tokenizer

DEADLINE_S = 30.0
CONTEXT = 100


def say(text: str) -> Callable[[EngineRequest, int, int], int]:
    """A model that says this text in as few tokens as its tokenizer needs, whatever it is asked, and then dots."""
    return _recite(text_tokenizer("byte_level").encode(text))


def spell(text: str) -> Callable[[EngineRequest, int, int], int]:
    """A model that says this text byte by byte."""
    letters = {byte: raw("byte_level").token_to_id(letter) for letter, byte in byte_level_alphabet().items()}
    return _recite([letters[byte] for byte in text.encode()])


def _recite(tokens: list[int]) -> Callable[[EngineRequest, int, int], int]:
    dot = raw("byte_level").token_to_id(".")
    return lambda _request, _branch, position: tokens[position] if position < len(tokens) else dot


class Screen:
    """A reader: keeps every call and every event, and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[list[StreamEvent]] = []
        self._changed = asyncio.Event()

    def __call__(self, events: list[StreamEvent]) -> None:
        self.calls.append(list(events))
        self._changed.set()

    def events(self, request_id: str) -> list[StreamEvent]:
        return [event for call in self.calls for event in call if event.id == request_id]

    def text(self, request_id: str) -> str:
        return "".join(event.text for event in self.events(request_id) if isinstance(event, Delta))

    def ends(self, request_id: str) -> list[Finished]:
        return [event for event in self.events(request_id) if isinstance(event, Finished)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def end(self, request_id: str) -> Finished:
        """Wait for the last event; it must be the last and the only one."""
        await self.until(lambda: bool(self.ends(request_id)))
        (finished,) = self.ends(request_id)
        assert self.events(request_id)[-1] is finished
        return finished


@asynccontextmanager
async def hub(reply: Any = None, *, tokenizer: TextTokenizer | None = None, **options: Any) -> AsyncIterator[TextStreams]:
    """A hub over a fake engine with a context of 100."""
    tokenizer = tokenizer or text_tokenizer("byte_level")
    info = fake_info(vocab_size=tokenizer.vocab_size, max_model_len=CONTEXT)
    engine = FakeEngine(reply or say("the quick brown fox"), info=info, **options)
    engine.start()
    async with TextStreams(engine, tokenizer) as streams:
        yield streams
    await engine.close()


async def start(streams: TextStreams, *ids: str, sink: Any, credit: int | None = None, **params: Any) -> None:
    prepared = await streams.prepare("the dog", SamplingParams(**({"max_tokens": 30} | params)), is_chat=False)
    await streams.open(ids, prepared, sink=sink, credit=credit)


async def run_to_rest(streams: TextStreams) -> None:
    """Let everybody who has credit get 50 tokens."""
    screen = Screen()
    await start(streams, "clock", sink=screen, max_tokens=50)
    await screen.end("clock")


# -- prepare ----------------------------------------------------------------------------------------------------------


class Untouchable(TextTokenizer):
    """A tokenizer that must not be asked."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("tokenised")

    def encode_chat(self, messages: Any, **_options: Any) -> list[int]:
        raise AssertionError("tokenised")


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], {}, InvalidRequestError, "prompt"),
        ([1, -1], {}, InvalidRequestError, "prompt"),
        ([10**9], {}, InvalidRequestError, "prompt"),
        ([1.0], {}, InvalidRequestError, "prompt"),
        ([True], {}, InvalidRequestError, "prompt"),
        ([None], {}, InvalidRequestError, "prompt"),
        (["a"], {}, InvalidRequestError, "prompt"),
        ([[1]], {}, InvalidRequestError, "prompt"),
        ([{"role": "user", "content": "x"}], {}, InvalidRequestError, "prompt"),
        ([1] * (CONTEXT + 1), {}, ContextLengthError, "prompt"),
        ([1] * CONTEXT, {"max_tokens": None}, ContextLengthError, "prompt"),
        ([1] * (CONTEXT - 1), {"max_tokens": 2}, ContextLengthError, "prompt"),
        ("text", {"max_tokens": CONTEXT}, ContextLengthError, "max_tokens"),
        ("text", {"stop_token_ids": (10**6,)}, InvalidRequestError, "stop_token_ids"),
        ("text", {"allowed_token_ids": (10**6,)}, InvalidRequestError, "allowed_token_ids"),
        ("text", {"bad_token_ids": (1, 10**6)}, InvalidRequestError, "bad_token_ids"),
        ("text", {"logit_bias": {10**6: 1.0}}, InvalidRequestError, "logit_bias"),
        ("text", {"logits_processors": {"nobody": None}}, InvalidRequestError, "logits_processors"),
        ([1] * (CONTEXT - 1), {"max_tokens": None, "min_tokens": 2}, ContextLengthError, "prompt"),
        ([1] * (CONTEXT + 1), {"max_tokens": 0, "echo": True}, ContextLengthError, "prompt"),
        (None, {}, InvalidRequestError, "prompt"),
        (5, {}, InvalidRequestError, "prompt"),
        (b"bytes", {}, InvalidRequestError, "prompt"),
        ({"prompt": "x"}, {}, InvalidRequestError, "prompt"),
    ],
)
async def test_bad_input_is_refused_before_anything_is_tokenised(
    prompt: Any, params: dict[str, Any], error: type[StreamKVError], param: str
) -> None:
    async with hub(tokenizer=Untouchable(raw("byte_level"))) as streams:
        with pytest.raises(error) as caught:
            await streams.prepare(prompt, SamplingParams(**params), is_chat=False)
    assert type(caught.value) is error
    assert caught.value.param == param


async def test_what_only_the_tokenizer_can_tell_is_told_with_the_fields_name() -> None:
    async with hub() as streams:
        with pytest.raises(InvalidRequestError, match="empty") as caught:
            await streams.prepare("", SamplingParams(), is_chat=False)
        assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthError) as caught:
            await streams.prepare([{"role": "user", "content": "x " * CONTEXT}], SamplingParams(), is_chat=True)
        assert caught.value.param == "messages"
        with pytest.raises(InvalidRequestError) as caught:
            await streams.prepare("not messages", SamplingParams(), is_chat=True)
        assert caught.value.param == "messages"


async def test_prepare_resolves_limits_seed_and_end_tokens() -> None:
    async with hub() as streams:
        open_end = await streams.prepare([1, 2, 3], SamplingParams(max_tokens=None, stop_token_ids=(7, 7)), is_chat=False)
        seeded = await streams.prepare([1], SamplingParams(seed=0), is_chat=False)
        exact = await streams.prepare([1] * (CONTEXT - 5), SamplingParams(max_tokens=5), is_chat=False)
        two = [await streams.prepare([1], SamplingParams(), is_chat=False) for _ in range(2)]
    assert open_end.sampling.max_tokens == CONTEXT - 3
    assert open_end.sampling.stop_token_ids == (7,)
    assert seeded.sampling.seed == 0
    assert exact.sampling.max_tokens == 5
    assert two[0].sampling.seed != two[1].sampling.seed, "drawn once per request"


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_a_stream_is_status_text_and_one_end() -> None:
    screen = Screen()
    async with hub() as streams:
        await start(streams, "a", sink=screen, max_tokens=40)
        finished = await screen.end("a")
        assert streams.num_open == 0
    text = screen.text("a")
    assert text.startswith("the quick brown fox")
    assert (finished.finish_reason, finished.completion_tokens, finished.error) == ("length", 40, None)
    assert finished.prompt_tokens == len(text_tokenizer("byte_level").encode("the dog"))
    assert [event.state for event in screen.events("a") if isinstance(event, Status)] == ["prefill", "decode"]
    deltas = [event for event in screen.events("a") if isinstance(event, Delta)]
    at = 0
    for delta in deltas:
        assert (delta.offset, delta.count) == (at, len(delta.token_ids))
        at += delta.count
    assert at == 40
    assert min(finished.timings.queue, finished.timings.prefill, finished.timings.decode) >= 0


async def test_characters_of_several_tokens_come_whole_with_all_their_tokens() -> None:
    screen = Screen()
    async with hub(spell("a🦀b")) as streams:
        await start(streams, "a", sink=screen, max_tokens=6)
        await screen.end("a")
    deltas = [event for event in screen.events("a") if isinstance(event, Delta)]
    assert [delta.text for delta in deltas] == ["a", "🦀", "b"]
    assert [(delta.offset, delta.count) for delta in deltas] == [(0, 1), (1, 4), (5, 1)]


async def test_the_news_of_a_stall_counts_the_tokens_whose_text_is_held_back() -> None:
    """Whoever grants credit tells by them whether the news is older than what it has granted."""
    screen = Screen()
    async with hub(spell("a🦀b")) as streams:
        await start(streams, "a", sink=screen, max_tokens=6, credit=3)
        await screen.until(lambda: any(isinstance(event, Status) and event.state == "stalled" for event in screen.events("a")))
        delivered = sum(event.count for event in screen.events("a") if isinstance(event, Delta))
        await streams.credit("a", 6)
        await screen.end("a")
    (stalled,) = [event for event in screen.events("a") if isinstance(event, Status) and event.state == "stalled"]
    assert (stalled.tokens, delivered) == (3, 1)


async def test_a_reader_is_called_once_a_batch_with_the_events_of_all_its_streams() -> None:
    one, other = Screen(), Screen()
    batches: list[StepBatch] = []
    async with hub() as streams:
        dispatch = streams._dispatch
        streams._dispatch = lambda batch: (batches.append(batch), dispatch(batch))[1]  # type: ignore[method-assign]  # a spy in its place
        await start(streams, "a", "b", "c", sink=one, max_tokens=8)
        await start(streams, "x", sink=other, max_tokens=8)
        for name in "abc":
            await one.end(name)
        await other.end("x")
    assert len(one.calls) <= len(batches)
    assert any(len({event.id for event in call}) == 3 for call in one.calls)
    assert all(event.id == "x" for call in other.calls for event in call)
    assert all(one.calls), "no empty calls"


async def test_prepared_once_opened_with_several_ids_are_independent_streams() -> None:
    screen = Screen()
    async with hub(lambda _request, branch, position: 40 + branch + position) as streams:
        await start(streams, "a", "b", sink=screen, max_tokens=3)
        await screen.end("a")
        await screen.end("b")
    assert screen.text("a")[1:] == screen.text("b")[:-1] != ""


# -- stop strings and tokens ------------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_stream_cancels_the_engine_and_drops_the_rest() -> None:
    screen = Screen()
    async with hub() as streams:
        await start(streams, "a", sink=screen, stop=("brown",), max_tokens=60)
        finished = await screen.end("a")
        await start(streams, "b", sink=screen, max_tokens=60)
        await screen.end("b")
        assert (await streams.client.stats()).running == 0
        assert (await streams.client.stats()).output_tokens < 120, "the engine has stopped early"
    assert screen.text("a") == "the quick "
    assert finished.finish_reason == "stop"
    assert finished.completion_tokens < 30
    assert len(screen.ends("a")) == 1


@pytest.mark.parametrize("stop", ["foxes", "fox...x"])
async def test_what_was_held_back_and_became_no_stop_string_is_released_at_the_end(stop: str) -> None:
    screen = Screen()
    length = len(text_tokenizer("byte_level").encode("the quick brown fox"))
    async with hub() as streams:
        await start(streams, "a", sink=screen, stop=(stop,), max_tokens=length)
        finished = await screen.end("a")
    assert screen.text("a") == "the quick brown fox"
    assert (finished.finish_reason, finished.completion_tokens) == ("length", length)


async def test_a_stop_string_that_completes_with_the_last_token_is_a_stop() -> None:
    screen = Screen()
    length = len(text_tokenizer("byte_level").encode("the quick brown fox"))
    async with hub() as streams:
        await start(streams, "a", sink=screen, stop=("fox",), max_tokens=length)
        finished = await screen.end("a")
    assert screen.text("a") == "the quick brown "
    assert finished.finish_reason == "stop"


async def test_a_stop_string_in_what_only_the_end_makes_certain_is_a_stop() -> None:
    """Byte tokens of sentencepiece are text once something else follows, or nothing more."""
    tokens = text_tokenizer("byte_fallback").encode("dog🦀")
    screen = Screen()
    async with hub(_recite(tokens), tokenizer=text_tokenizer("byte_fallback")) as streams:
        await start(streams, "a", sink=screen, stop=("🦀",), max_tokens=len(tokens))
        finished = await screen.end("a")
    assert screen.text("a") == " dog", "after the prompt a word keeps its space"
    assert (finished.finish_reason, finished.completion_tokens) == ("stop", len(tokens))


async def test_a_stop_string_across_tokens_and_with_whole_characters() -> None:
    screen = Screen()
    async with hub(say("ab🦀cd日本ef")) as streams:
        await start(streams, "a", sink=screen, stop=("🦀c",))
        await start(streams, "b", sink=screen, stop=("本e", "zzz"))
        await screen.end("a")
        await screen.end("b")
    assert screen.text("a") == "ab"
    assert screen.text("b") == "ab🦀cd日"


async def test_a_stop_token_is_counted_and_not_shown() -> None:
    screen = Screen()
    tokens = text_tokenizer("byte_level").encode("the quick brown fox")
    async with hub() as streams:
        await start(streams, "a", sink=screen, stop_token_ids=(tokens[2],))
        finished = await screen.end("a")
    end = tokens.index(tokens[2])
    assert screen.text("a") == text_tokenizer("byte_level").decode(tokens[:end])
    assert (finished.finish_reason, finished.completion_tokens) == ("stop", end + 1)


async def test_an_id_whose_stream_was_stopped_is_free_only_when_the_engine_has_ended_it() -> None:
    """Otherwise the first stream's end, still on its way, would end the second."""
    reopened, refused, opened = Screen(), 0, asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def reopen() -> None:
        nonlocal refused
        while not opened.is_set():
            try:
                await streams.open(["a"], prepared, sink=reopened)
                opened.set()
            except InvalidRequestError:
                refused += 1
                await asyncio.sleep(0)

    def sink(events: list[StreamEvent]) -> None:
        if any(isinstance(event, Finished) for event in events):
            tasks.append(asyncio.create_task(reopen()))

    async with hub() as streams, asyncio.timeout(DEADLINE_S):
        prepared = await streams.prepare("the dog", SamplingParams(max_tokens=5), is_chat=False)
        await start(streams, "a", sink=sink, stop=("brown",), max_tokens=60)
        await opened.wait()
        finished = await reopened.end("a")
    assert (finished.finish_reason, finished.completion_tokens) == ("length", 5)
    assert refused


# -- ends -------------------------------------------------------------------------------------------------------------


async def test_cancel_ends_with_its_reason_and_releases_what_was_held() -> None:
    screen = Screen()
    async with hub(spell("ab🦀")) as streams:
        await start(streams, "a", sink=screen, credit=3, stop=("b", "zz"))
        await start(streams, "b", sink=screen, credit=3, stop=("abX",))
        await screen.end("a")
        await run_to_rest(streams)
        assert screen.text("b") == ""
        await streams.cancel("nobody")
        await streams.cancel("b")
        await streams.cancel("b")
        finished = await screen.end("b")
    assert finished.finish_reason == "cancelled"
    assert screen.text("b") == "ab\ufffd", "half a character at the end is shown as such, as the decoding of all tokens is"
    assert screen.text("a") == "a"


async def test_a_sink_that_raises_harms_only_its_own_streams() -> None:
    calls = 0

    def broken(_events: list[StreamEvent]) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("a reader's mistake")

    screen = Screen()
    async with hub() as streams:
        await start(streams, "bad", sink=broken, max_tokens=5)
        await start(streams, "good", sink=screen, max_tokens=20)
        finished = await screen.end("good")
        assert streams.alive
        assert streams.num_open == 0
    assert calls > 1
    assert finished.completion_tokens == 20


@pytest.mark.parametrize("end", ["close", "fail", "leave"])
async def test_an_engine_that_is_lost_gives_every_stream_one_last_event(end: str) -> None:
    screens = {name: Screen() for name in ("one", "two", "parked", "done")}
    async with hub(spell("ab" * 30)) as streams:
        await start(streams, "done", sink=screens["done"], max_tokens=2)
        await screens["done"].end("done")
        for name in ("one", "two", "parked"):
            await start(streams, name, sink=screens[name], credit=5, stop=("abX", "b" * 9))
        await run_to_rest(streams)
        assert screens["two"].text("two") == "abab"
        if end == "close":
            await streams.client.close()
        elif end == "fail":
            streams._dispatch = lambda _batch: 1 / 0  # type: ignore[assignment,method-assign]  # a bug of ours
            await streams.client.cancel("one")
        else:
            await streams.__aexit__(None, None, None)
        reasons = {name: await screens[name].end(name) for name in ("one", "two", "parked")}
        assert not streams.alive
        assert streams.num_open == 0
        for finished in reasons.values():
            assert finished.finish_reason == ("cancelled" if end == "close" else "error")
            assert finished.error is None if end == "close" else finished.error[0] == "engine_lost"  # type: ignore[index]  # set, by the line before
            assert finished.completion_tokens == 5
        assert screens["two"].text("two") == "ababa", "held-back text is not lost with the engine"
        with pytest.raises(StreamKVError) as caught:
            await start(streams, "late", sink=screens["one"])
        assert not isinstance(caught.value, InvalidRequestError)
        assert streams.num_open == 0
        assert len(screens["done"].ends("done")) == 1


# -- open -------------------------------------------------------------------------------------------------------------


async def test_open_that_is_refused_leaves_nothing_behind() -> None:
    screen = Screen()
    async with hub(max_live=2) as streams:
        await start(streams, "a", sink=screen, credit=0)
        with pytest.raises(InvalidRequestError, match="in use"):
            await start(streams, "a", sink=screen)
        with pytest.raises(InvalidRequestError):
            await start(streams, "b", "b", sink=screen)
        with pytest.raises(InvalidRequestError):
            await start(streams, "b", "a", sink=screen)
        with pytest.raises(OverloadedError):
            await start(streams, "b", "c", sink=screen)
        assert streams.num_open == 1
        assert screen.calls == []
        await start(streams, "b", sink=screen, max_tokens=3)
        await screen.end("b")
        await streams.client.drain(0.0)
        with pytest.raises(DrainingError):
            await start(streams, "d", sink=screen)
        finished = await screen.end("a")
        assert finished.finish_reason == "cancelled"
        assert streams.num_open == 0

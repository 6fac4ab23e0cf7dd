"""Where a text begins and ends: echoed prompts, min_tokens, stop strings that are kept, and what is said of the prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest

from streamkv.engine.api import EngineRequest, StepOutput
from streamkv.sampling_params import PromptLogprobs, Sampling, SamplingParams, TokenLogprobs
from streamkv.text.events import Delta, Finished, PromptRead, Score, StreamEvent
from streamkv.text.stream import PreparedPrompt, TextStream
from tests.text.kinds import KINDS, text_tokenizer
from tests.text.test_streams import CONTEXT, Screen, hub, say, start

TEXT = "the quick brown fox"


async def said(reply: Any = None, **params: Any) -> tuple[str, Finished]:
    screen = Screen()
    async with hub(reply) as streams:
        await start(streams, "a", sink=screen, **params)
        finished = await screen.end("a")
        assert streams.num_open == 0
    return screen.text("a"), finished


# -- min_tokens ---------------------------------------------------------------------------------------------------------


async def test_a_stop_string_before_min_tokens_is_plain_text() -> None:
    tokens = text_tokenizer("byte_level").encode("the quick")
    text, finished = await said(stop=("quick", "fox"), min_tokens=len(tokens) + 1)
    assert (text, finished.finish_reason) == ("the quick brown ", "stop")
    text, finished = await said(stop=("quick", "fox"), min_tokens=len(tokens))
    assert (text, finished.finish_reason) == ("the ", "stop"), "the token that completes it is enough"


async def test_no_stop_token_is_taken_for_one_before_min_tokens() -> None:
    tokens = text_tokenizer("byte_level").encode(TEXT)
    everything = tuple(sorted(set(tokens)))[:16]
    first = next(index for index, token in enumerate(tokens) if index >= 3 and token in everything)
    text, finished = await said(stop_token_ids=everything, min_tokens=3)
    assert (finished.finish_reason, finished.completion_tokens) == ("stop", first + 1)
    assert text == text_tokenizer("byte_level").decode(tokens[:first])


# -- what ended the text is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["brown", "ck br", "the quick brown fox"])
async def test_the_stop_string_is_kept_if_asked_for(stop: str) -> None:
    text, finished = await said(stop=(stop,), include_stop_str_in_output=True)
    assert (text, finished.finish_reason) == (TEXT[: TEXT.index(stop) + len(stop)], "stop")


async def test_the_text_of_a_stop_token_is_kept_if_asked_for() -> None:
    tokens = text_tokenizer("byte_level").encode(TEXT)
    text, _ = await said(stop_token_ids=(tokens[2],), include_stop_str_in_output=True)
    assert text == text_tokenizer("byte_level").decode(tokens[: tokens.index(tokens[2]) + 1])


async def test_a_stop_string_that_never_completes_is_text_also_if_it_were_kept() -> None:
    length = len(text_tokenizer("byte_level").encode(TEXT))
    text, finished = await said(stop=("foxes",), include_stop_str_in_output=True, max_tokens=length)
    assert (text, finished.finish_reason) == (TEXT, "length")


# -- echo ---------------------------------------------------------------------------------------------------------------


async def test_an_echo_is_the_first_delta_and_has_no_tokens() -> None:
    screen = Screen()
    async with hub() as streams:
        await start(streams, "a", "b", sink=screen, echo=True, max_tokens=5)
        for name in "ab":
            await screen.end(name)
    for name in "ab":
        first, *rest = [event for event in screen.events(name) if isinstance(event, Delta)]
        assert (first.offset, first.count, first.text, first.token_ids) == (0, 0, "the dog", ())
        assert sum(delta.count for delta in rest) == 5


async def test_a_stop_string_in_the_echo_ends_nothing() -> None:
    text, finished = await said(echo=True, stop=("dog",), max_tokens=3)
    assert finished.finish_reason == "length"
    assert text.startswith("the dog")


@pytest.mark.parametrize("kind", KINDS)
async def test_echo_and_completion_join_to_the_decoding_of_all_tokens(kind: str) -> None:
    """The space between them included, which tokenizers with ▁ would drop at the start of a text."""
    tokenizer = text_tokenizer(kind)
    whole = tokenizer.encode("the quick brown fox jumps over")
    cut = len(tokenizer.encode("the quick"))
    events: list[StreamEvent] = []
    prepared = PreparedPrompt(whole[:cut], Sampling(max_tokens=50), echo=tokenizer.decode(whole[:cut]))
    stream = TextStream("a", prepared, tokenizer, lambda _: None, 0.0)
    for token in whole[cut:]:
        stream.take(StepOutput("a", (token,)), 0.0, events)
    stream.take(StepOutput("a", finish_reason="cancelled"), 0.0, events)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == tokenizer.decode(whole)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
async def test_an_echo_does_not_show_half_a_character_that_the_output_finishes(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    whole = tokenizer.encode("a\U0001f980b")
    for cut in range(1, len(whole)):
        reply = lambda _request, _branch, position, cut=cut: whole[cut + position]  # noqa: E731  # one line a cut
        screen = Screen()
        async with hub(reply, tokenizer=tokenizer) as streams:
            prepared = await streams.prepare(whole[:cut], SamplingParams(max_tokens=len(whole) - cut, echo=True), is_chat=False)
            await streams.open(["a"], prepared, sink=screen)
            await screen.end("a")
        assert screen.text("a") == tokenizer.decode(whole)


# -- what is said of the prompt -----------------------------------------------------------------------------------------


def entries(*values: float) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(value) for value in values)


@pytest.mark.parametrize(
    ("score_from", "expected"), [(1, (-15.0, 5)), (2, (-14.0, 4)), (3, (-12.0, 3)), (4, (-9.0, 2)), (5, (-5.0, 1))]
)
def test_a_score_counts_from_its_first_token_however_the_prompt_is_cut(score_from: int, expected: tuple[float, int]) -> None:
    values = [-1.0, -2.0, -3.0, -4.0, -5.0]  # of the prompt tokens 1 to 5
    for size in range(1, 6):
        prepared = PreparedPrompt([0] * 6, Sampling(max_tokens=0, prompt_logprobs=0), score_from=score_from)
        stream = TextStream("a", prepared, text_tokenizer("byte_level"), lambda _: None, 0.0)
        events: list[StreamEvent] = []
        for at in range(0, 5, size):
            logprobs = PromptLogprobs(1 + at, entries(*values[at : at + size]))
            stream.take(StepOutput("a", prompt_logprobs=logprobs), 0.0, events)
        stream.take(StepOutput("a", finish_reason="length"), 0.0, events)
        (finished,) = events
        assert isinstance(finished, Finished)
        assert finished.score == Score(*expected)


def test_perplexity() -> None:
    assert Score(-2 * math.log(8), 2).perplexity == pytest.approx(8.0)
    assert Score(0.0, 0).perplexity == 1.0
    assert Score(-math.inf, 3).perplexity == math.inf
    assert Score(-1e9, 3).perplexity == math.inf, "too large for a float is not an error"


@pytest.mark.parametrize(
    ("params", "asked", "reported"),
    [
        ({}, None, False),
        ({"logprobs": 2}, None, False),
        ({"echo": True}, None, False),
        ({"echo": True, "logprobs": 2}, 2, True),
        ({"prompt_logprobs": 0}, 0, True),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 5}, 5, True),
    ],
)
async def test_log_probabilities_of_the_prompt_come_when_asked_for(
    params: dict[str, Any], asked: int | None, reported: bool
) -> None:
    seen: list[EngineRequest] = []
    screen = Screen()
    async with hub() as streams:
        submit = streams.client.submit

        async def spy(request: EngineRequest) -> None:
            seen.append(request)
            await submit(request)

        streams.client.submit = spy  # type: ignore[method-assign]  # a spy in its place
        await start(streams, "a", sink=screen, max_tokens=2, **params)
        await screen.end("a")
    assert seen[0].sampling.prompt_logprobs == asked
    assert any(isinstance(event, PromptRead) for event in screen.events("a")) == reported


async def test_everything_that_is_asked_for_reaches_the_engine() -> None:
    async with hub() as streams:
        prepared = await streams.prepare(
            [1, 2],
            SamplingParams(
                min_tokens=2,
                top_k=-1,
                min_p=0.1,
                typical_p=0.9,
                repetition_penalty=1.2,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                logit_bias={7: 1, 9: -2.5},
                allowed_token_ids=(3, 3, 4),
                bad_token_ids=(8, 8),
                bad_words=("the dog",),
            ),
            is_chat=False,
        )
    words = text_tokenizer("byte_level").bad_word_ids("the dog")
    assert words
    expected = Sampling(
        max_tokens=16,
        min_tokens=2,
        top_k=0,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias=((7, 1.0), (9, -2.5)),
        allowed_token_ids=(3, 4),
        bad_words=((8,), *words),
        seed=prepared.sampling.seed,
    )
    assert prepared.sampling == expected


async def test_a_full_context_can_be_read_without_generating() -> None:
    async with hub(say("x")) as streams:
        prepared = await streams.prepare([1] * CONTEXT, SamplingParams(max_tokens=0, prompt_logprobs=0), is_chat=False)
        assert prepared.sampling.max_tokens == 0
        assert (await streams.prepare_score([1] * CONTEXT)).score_from == 1


def test_a_step_of_several_tokens_is_cut_where_min_tokens_begins() -> None:
    """A step can bring several tokens; only what completes from the limit on may end the text."""
    tokenizer = text_tokenizer("byte_level")
    tokens = tokenizer.encode("a fox and a fox")
    first = len(tokenizer.encode("a fox"))
    for least in range(len(tokens) + 1):
        prepared = PreparedPrompt([1], Sampling(max_tokens=99, min_tokens=least), stop=("fox",))
        stream = TextStream("a", prepared, tokenizer, lambda _: None, 0.0)
        events: list[StreamEvent] = []
        stream.take(StepOutput("a", tuple(tokens)), 0.0, events)
        text = "".join(event.text for event in events if isinstance(event, Delta))
        assert text == ("a " if least <= first else "a fox and a ")
        assert stream.finished

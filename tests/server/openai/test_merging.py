"""What waits for a slow reader is merged, and reads the same however seldom it is taken."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamkv.engine.api import StepOutput
from streamkv.sampling_params import Sampling, SamplingParams
from streamkv.server.openai.answer import Answer, AnswerContext
from streamkv.server.openai.chat import ChatAnswer
from streamkv.server.openai.completions import CompletionAnswer
from streamkv.server.openai.generation import Generation, Workload
from streamkv.server.openai.names import TokenNames
from streamkv.server.openai.shapes import ChatChunk, Completion, Head
from streamkv.text.events import StreamEvent
from streamkv.text.stream import PreparedPrompt, TextStream
from tests.server.openai.dialect import known
from tests.server.serving import CountingTokenizer

TOKENIZER = CountingTokenizer(256)
PROMPT = [0xC3, 97, 0xE2]

OUTPUTS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([97, 98, 0xC3, 0xA9, 256, 290, 33])), max_size=40)
TAKES = st.lists(st.booleans(), min_size=42, max_size=42)


def generated(outputs: list[tuple[int, int]], stop: tuple[str, ...], echo: bool, sink: Any) -> None:
    """Run two samples from prompt to end; `sink` gets the events of each step."""
    prepared = PreparedPrompt(PROMPT, Sampling(max_tokens=99, logprobs=1), stop, echo=TOKENIZER.decode(PROMPT) if echo else "")
    streams = [TextStream(f"r.{index}", prepared, TOKENIZER, sink, 0.0) for index in range(2)]
    steps = [StepOutput(f"r.{index}", (token,), logprobs=(known(token, 1),)) for index, token in outputs]
    steps += [StepOutput(f"r.{index}", finish_reason="length") for index in range(2)]
    for step in steps:
        stream, events = streams[int(step.id[-1])], list[StreamEvent]()
        if not stream.finished:
            stream.take(step, 1.0, events)
        sink(events)


def context(generation: Generation, echo: bool) -> AnswerContext:
    params = SamplingParams(n=2, logprobs=1, echo=echo)
    prepared = PreparedPrompt(PROMPT, Sampling(max_tokens=99), echo=TOKENIZER.decode(PROMPT) if echo else "")
    known_prompt = [known(token, 1) for token in PROMPT[1:]]
    head = Head(id="id", created=0, model="m", system_fingerprint="fp")
    return AnswerContext(head, params, [prepared], TokenNames(TOKENIZER), "last", [known_prompt])


def joined(chunks: list[Any]) -> list[tuple[str, Any, list[Any]]]:
    """Text, reason and log-probabilities of both choices."""
    result: list[Any] = [["", None, []] for _ in range(2)]
    for chunk in chunks:
        for choice in chunk.choices:
            mine = result[choice.index]
            assert mine[1] is None, "something after the end"
            text = choice.text if isinstance(chunk, Completion) else choice.delta.content
            mine[0] += text if isinstance(text, str) else ""
            mine[1] = choice.finish_reason
            if choice.logprobs is not None:
                lists = choice.logprobs
                mine[2] += lists.content if isinstance(chunk, ChatChunk) else zip(*_columns(lists), strict=True)
    return [tuple(each) for each in result]


def _columns(lists: Any) -> list[list[Any]]:
    return [lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset]


@given(
    OUTPUTS, TAKES, st.sampled_from([(), ("ab",), ("aab", "é")]), st.booleans(), st.sampled_from([ChatAnswer, CompletionAnswer])
)
def test_however_seldom_it_is_taken(
    outputs: list[tuple[int, int]], takes: list[bool], stop: tuple[str, ...], echo: bool, dialect: Any
) -> None:
    echo = echo and dialect is CompletionAnswer

    def opened() -> tuple[Generation, Answer]:
        work = Workload(None, None, lambda: None)  # type: ignore[arg-type]  # nothing is submitted
        generation = Generation(work, "r", [PreparedPrompt(PROMPT, Sampling(max_tokens=99))], 2, 1 << 20, lambda _: None)
        generation._next = 1  # as if its prompt had been submitted
        return generation, dialect(context(generation, echo))

    chunks: list[Any] = []
    slow, answer = opened()
    turns = iter(takes)

    def sink(events: list[StreamEvent]) -> None:
        slow._sink(events)
        if next(turns):
            pieces = list(slow.take())
            assert len(pieces) == len({piece.index for piece in pieces})
            chunks.extend(chunk for piece in pieces for chunk in answer.chunks(piece))

    generated(outputs, stop, echo, sink)
    chunks += [chunk for piece in slow.take() for chunk in answer.chunks(piece)]
    assert slow.ended.is_set()
    whole_generation, whole_answer = opened()
    generated(outputs, stop, echo, whole_generation._sink)
    whole: Any = whole_answer.whole(list(whole_generation.take()))
    last: Any = answer.last_chunk()
    assert last.usage == whole.usage
    for (text, reason, logprobs), choice in zip(joined(chunks), whole.choices, strict=True):
        assert text == (choice.text if dialect is CompletionAnswer else choice.message.content)
        assert reason == choice.finish_reason
        ours = (
            choice.logprobs.content
            if dialect is ChatAnswer
            else list(zip(*_columns(choice.logprobs), strict=True))
            if choice.logprobs
            else []
        )
        assert logprobs == ours

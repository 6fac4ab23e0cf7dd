"""A streamed answer is the whole answer in pieces: text, reasons, log-probabilities and usage, whatever is asked for."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv.engine.api import EngineRequest
from tests.server.openai.dialect import CHAT, COMPLETIONS, door, post, stream
from tests.server.serving import Serving

TEXTS = ["the end is near. The End!", "äöü 日本語 🙂 ok", "aaaaab aaab ab", "ST STO STOP", "\ufffd\u200d", "ab\n\ncd\n"]
PIECES = ["a", "aab", "STOP", "end", " ", "\n\n", "語", "🙂", ". ", "zzz", "ä"]


def scripted(request: EngineRequest, branch: int, position: int) -> int:
    """A text that depends on prompt, seed and branch; some of its bytes are no characters, some tokens are special."""
    dice = random.Random(f"{request.prompt}{request.sampling.seed}{branch}")
    words = [*TEXTS, *PIECES]
    data = b"".join(dice.choice(words).encode() for _ in range(12)) * 20
    token = data[position]
    return dice.choice([256, 257, 258, 0xE2, 290]) if (position * 7 + branch) % 23 == 22 else token


BODY = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 50),
    },
    optional={
        "stop": st.lists(st.sampled_from(PIECES), max_size=4),
        "stop_token_ids": st.lists(st.sampled_from([97, 10, 256]), max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "min_tokens": st.integers(0, 1),
    },
)
COMPLETION = st.fixed_dictionaries(
    {"prompt": st.sampled_from(TEXTS)},
    optional={"echo": st.booleans(), "logprobs": st.integers(0, 3)},
)
CONVERSATION = st.fixed_dictionaries(
    {"messages": st.sampled_from(TEXTS).map(lambda text: [{"role": "user", "content": text}])},
    optional={"logprobs": st.booleans()},
)


class Joined:
    """What a client has that adds up the chunks."""

    def __init__(self, chunks: list[dict[str, Any]], n: int) -> None:
        self.texts, self.reasons = [""] * n, [None] * n
        self.logprobs: list[dict[str, list[Any]]] = [{} for _ in range(n)]
        self.usage = chunks[-1]["usage"]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            index = choice["index"]
            assert self.reasons[index] is None, "something comes after a choice's end"
            self.texts[index] += choice.get("text", "") or choice.get("delta", {}).get("content", "")
            self.reasons[index] = choice["finish_reason"]
            for name, entries in (choice["logprobs"] or {}).items():
                self.logprobs[index].setdefault(name, []).extend(entries or [])

    def check(self, whole: dict[str, Any]) -> None:
        choices = whole["choices"]
        assert self.texts == [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
        assert self.reasons == [choice["finish_reason"] for choice in choices]
        assert self.usage == whole["usage"]
        for ours, choice in zip(self.logprobs, choices, strict=True):
            theirs = {name: entries or [] for name, entries in (choice["logprobs"] or {}).items()}
            assert ours == theirs or (not ours and not any(theirs.values()))


async def compare(served: Serving, path: str, body: dict[str, Any]) -> None:
    (status, whole, _), chunks = await asyncio.gather(
        post(served, path, body), stream(served, path, body | {"stream_options": {"include_usage": True}})
    )
    assert status == 200, whole
    Joined(chunks, body["n"]).check(whole)
    for choice in whole["choices"]:
        if path == COMPLETIONS and choice["logprobs"] is not None:
            check_offsets(choice)


def check_offsets(choice: dict[str, Any]) -> None:
    """Where a token is said to begin, its text stands, as far as it is shown and a whole character."""
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        shown = choice["text"][offset : offset + len(token)]
        if not token.startswith(("bytes:", "<|")) and len(shown) == len(token) and "\ufffd" not in shown:
            assert shown == token, (token, offset, choice["text"])


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("loop", LOOPS)
def test_streamed_is_whole(path: str, loop: str) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        opened = door(scripted)
        served = runner.run(opened.__aenter__())

        @settings(max_examples=120)
        @given(BODY, COMPLETION if path == COMPLETIONS else CONVERSATION)
        def same(body: dict[str, Any], own: dict[str, Any]) -> None:
            body["min_tokens"] = min(body.get("min_tokens", 0), body["max_tokens"])
            runner.run(compare(served, path, body | own))

        try:
            same()
        finally:
            runner.run(opened.__aexit__(None, None, None))

"""Texts made to be slow cost no more than their length: counted where it can be counted, timed with a wide margin elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import pytest

from streamkv.text.detokenizer import IncrementalDetokenizer
from streamkv.text.guard import SpecialText
from streamkv.text.stop import StopStrings
from streamkv.text.template import ChatTemplate
from streamkv.text.tokenizer import TextTokenizer
from tests.text.kinds import CHATML, KINDS, raw, text_tokenizer

SMALL, LARGE = 32 * 1024, 128 * 1024  # bytes; a cost that grows with the square would be 16 times as high
MARGIN = 9.0  # instead of 4: the memory is slower for the larger one, and others use the machine

HARD = {
    "one character": "a",
    "combining marks": "\u0301",
    "special tokens": "<|im_start|>",
    "nearly special": "<|im_",
    "CJK": "日本",
    "spaces": " ",
    "byte look-alikes": "<0x41>",
    "joined emoji": "👩‍👩‍👧",
    "line ends": "\r\n",
    "quotes": "'\"\\",
}


def is_linear(run: Callable[[str], Any], unit: str) -> bool:
    """True if a text of four times the length takes about four times as long, at least once in three."""

    def seconds(size: int) -> float:
        text = unit * (size // len(unit.encode()))
        started = process_time()
        run(text)
        return process_time() - started

    return any(seconds(LARGE) / max(seconds(SMALL), 1e-3) < MARGIN for _ in range(3))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "wordpiece", "unigram", "gemma"])
@pytest.mark.parametrize("name", HARD)
def test_tokenising_costs_no_more_than_the_length(kind: str, name: str) -> None:
    assert is_linear(text_tokenizer(kind).encode, HARD[name])


@pytest.mark.parametrize("name", HARD)
def test_guarding_and_rendering_cost_no_more_than_the_length(name: str) -> None:
    many = SpecialText([*(f"<|reserved_special_token_{index}|>" for index in range(1000)), "<|im_start|>", "<s>"])
    template = ChatTemplate(CHATML)

    def write(text: str) -> None:
        (talk,), _typed = many.guard([{"role": "user", "content": text}])
        template.render(talk)

    assert is_linear(write, HARD[name])


def test_special_tokens_are_found_in_a_trie() -> None:
    """One look per character, however many tokens there are: as an alternation, three seconds per MiB with a thousand."""
    names = [f"<|reserved_special_token_{index}|>" for index in range(1000)]
    pattern = SpecialText([*names, "<s>", "<s>x"])._pattern
    assert pattern is not None
    assert pattern.pattern.count("reserved_special") == 1
    text = "a<|reserved_special_token_12|>b<|reserved_special_token_123|><s><s>x<|reserved_special_token_1000|>"
    longest = re.compile("|".join(map(re.escape, sorted([*names, "<s>", "<s>x"], key=len, reverse=True))))
    assert pattern.findall(text) == longest.findall(text)


class Counting(TextTokenizer):
    """Counts the tokens that are decoded."""

    decoded = 0

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return super().decode_raw(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HARD)
def test_detokenising_decodes_each_token_a_bounded_number_of_times(kind: str, name: str) -> None:
    def count(tokens: Sequence[int]) -> int:
        tokenizer = Counting(raw(kind))
        detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=tokens)
        for token in tokens:
            detokenizer.push([token])
        detokenizer.finish()
        return tokenizer.decoded

    tokens = text_tokenizer(kind).encode(HARD[name] * 300)[:300]
    assert count(tokens) <= 20 * len(tokens)
    assert count([*tokens, *tokens]) <= 2 * count(tokens) + 40


NEAR = ["a" * 63 + "b", "ab" * 31 + "b", "\u0301" * 64, "aab" * 21]


@pytest.mark.parametrize("text", ["a", "ab", "\u0301", "aab", " "])
def test_stop_strings_look_at_new_text_and_what_is_held_back_only(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hold_from = StopStrings._hold_from

    def noted(self: StopStrings, text: str) -> int:
        seen.append(len(text))
        return hold_from(self, text)

    monkeypatch.setattr(StopStrings, "_hold_from", noted)
    finder = StopStrings(NEAR)
    for _ in range(3000):
        finder.push(text)
        if finder.stopped:
            break
    assert max(seen) < 64 + len(text)


@pytest.mark.parametrize("name", HARD)
def test_stop_strings_in_one_long_text_cost_no_more_than_its_length(name: str) -> None:
    assert is_linear(StopStrings([*NEAR, HARD[name] * 5 + "!"]).push, HARD[name])

"""Streamed text is exact: the pieces join to the decoding of the whole, for every kind of tokenizer and every cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv.text.detokenizer import IncrementalDetokenizer, byte_level_alphabet
from streamkv.text.tokenizer import TextTokenizer
from tests.text.kinds import KINDS, LINES, SPECIAL, raw, text_tokenizer

BROKEN = "\ufffd"

WITH_BYTES = ["byte_level", "byte_fallback", "gemma", "prefix_space", "odd_words"]

# Whole characters of all widths, joiners, combining marks, spaces; no surrogates, and no U+FFFD of its own.
words = [*" ".join(LINES[:5]).split(), " ", "\n", "🙂", "👩‍👩‍👧", "é", "e\u0301", "日本", "'s"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN), max_size=40),
    st.lists(st.sampled_from(words), max_size=12).map("".join),
)


def any_tokens(tokenizer: TextTokenizer) -> st.SearchStrategy[list[int]]:
    """Many bytes, special tokens and added words; some ids that no vocabulary has."""
    rare = sorted(tokenizer.special_ids) + list(range(tokenizer.vocab_size - 5, tokenizer.vocab_size + 2))
    strange = sorted(tokenizer.byte_ids) or list(range(5, 261))
    emoji = tokenizer.encode("🙂")
    single = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(strange), st.sampled_from(rare))
    return st.lists(st.one_of(single.map(lambda token: [token]), st.just(emoji)), max_size=25).map(
        lambda parts: list(chain(*parts))
    )


def pieces(
    tokenizer: TextTokenizer, tokens: list[int], cuts: list[int], *, skip: bool = True, prompt: Sequence[int] = ()
) -> list[str]:
    """Push the tokens in steps of the given sizes (the last size again and again), then finish."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    found: list[str] = []
    at = index = 0
    while at < len(tokens):
        size = cuts[min(index, len(cuts) - 1)]
        found.append(detokenizer.push(tokens[at : at + size]))
        at += size
        index += 1
    return [*found, detokenizer.finish()]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_lines_token_by_token(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    for line in LINES[:5]:
        tokens = tokenizer.encode(line)
        found = pieces(tokenizer, tokens, [1])
        assert "".join(found) == tokenizer.decode(tokens)
        assert BROKEN not in "".join(found)
        if not tokenizer.byte_ids:  # there a later bad byte would spoil the run, so a run at the end is held back
            assert found[-1] == "", "whole characters leave nothing behind"


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_text_in_any_steps_is_the_decoding_of_the_whole(kind: str, text: str, cuts: list[int]) -> None:
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode(text)
    found = pieces(tokenizer, tokens, cuts)
    assert "".join(found) == tokenizer.decode(tokens)
    assert all(BROKEN not in piece for piece in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=60)
@given(data=st.data())
def test_what_follows_a_prompt_is_the_rest_of_the_decoding_of_both(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = text_tokenizer(kind)
    prompt, output = data.draw(any_tokens(tokenizer)), data.draw(any_tokens(tokenizer))
    said = tokenizer.decode(prompt, skip_special_tokens=skip)
    both = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    if both.startswith(said) and not said.endswith(BROKEN):  # or there is no such rest
        assert said + "".join(pieces(tokenizer, output, [1], skip=skip, prompt=prompt)) == both


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_word_keeps_its_space_after_a_prompt_and_not_after_none(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    prompt, both = tokenizer.encode("the dog"), tokenizer.encode("the dog jumps over")
    output = both[len(prompt) :]
    assert both[: len(prompt)] == prompt
    assert "".join(pieces(tokenizer, output, [1], prompt=prompt)) == " jumps over"
    assert "".join(pieces(tokenizer, output, [1])) == tokenizer.decode(output)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_character_that_the_prompt_leaves_unfinished_comes_with_the_output(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode("dog 🦀🦀")
    for kept in range(1, 4):
        found = pieces(tokenizer, [*tokens[-kept:], *tokenizer.encode("the")], [1], prompt=tokens[:-kept])
        assert "".join(found) in ("🦀the", "🦀 the")


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_bytes_of_a_long_prompt_do_not_spoil_those_of_the_output(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    for prompt in ("ㄅ" * 50, "🦀ㄅ", "aㄅㄅㄅ"):  # what is kept of the prompt begins inside a character
        found = pieces(tokenizer, [*tokenizer.encode("🦀"), *tokenizer.encode("\n")], [1], prompt=tokenizer.encode(prompt))
        assert BROKEN not in "".join(found)
        assert "".join(found).lstrip().startswith("🦀")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=texts)
def test_tokenizers_that_lose_nothing_give_the_text_back(kind: str, text: str) -> None:
    if kind == "byte_fallback" and (text.startswith(" ") or "▁" in text or any(name in text for name in SPECIAL)):
        return  # the first space is the one that Metaspace would add; ▁ is its own spelling of a space
    tokenizer = text_tokenizer(kind)
    assert "".join(pieces(tokenizer, tokenizer.encode(text), [1])) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=60)
@given(data=st.data())
def test_random_token_ids_in_any_steps_are_the_decoding_of_the_whole(kind: str, skip: bool, data: st.DataObject) -> None:
    """A model may say anything: half characters, stray continuation bytes, special tokens in the middle."""
    tokenizer = text_tokenizer(kind)
    tokens = data.draw(any_tokens(tokenizer))
    cuts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    assert "".join(pieces(tokenizer, tokens, cuts, skip=skip)) == tokenizer.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, step=st.integers(1, 3))
def test_no_piece_ends_inside_a_character(kind: str, text: str, step: int) -> None:
    """Every prefix of what was released is valid UTF-8 and a prefix of the final text."""
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode(text)
    whole, seen = tokenizer.decode(tokens), ""
    for piece in pieces(tokenizer, tokens, [step]):
        piece.encode()  # a lone surrogate would raise
        seen += piece
        assert whole.startswith(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_no_vocabulary_has_add_nothing(kind: str) -> None:
    """Logits are often wider than the vocabulary: a model can say such ids."""
    tokenizer = text_tokenizer(kind)
    tokens = [*tokenizer.encode("the dog"), tokenizer.vocab_size + 7, *tokenizer.encode("lazy")]
    assert "".join(pieces(tokenizer, tokens, [1])) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_half_a_character_is_held_back_until_it_is_whole(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode("a\U0001f980")  # a crab, in no training line: several tokens
    detokenizer = IncrementalDetokenizer(tokenizer)
    released = [detokenizer.push([token]) for token in tokens]
    assert len(tokens) >= 4
    assert "".join(released[:-1]) == ("a" if kind != "prefix_space" else " a")
    assert released[-1] + detokenizer.finish() == "\U0001f980"


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_what_comes_before_half_a_character_is_not_held_back_with_it(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode("dog\U0001f980")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(tokens[:-1]).lstrip() == "dog"
    assert detokenizer.push(tokens[-1:]) + detokenizer.finish() == "\U0001f980"


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_half_a_character_at_the_end_is_released_as_a_replacement(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    tokens = tokenizer.encode("a\U0001f980")[:-1]
    found = pieces(tokenizer, tokens, [1])
    assert "".join(found) == tokenizer.decode(tokens)
    assert BROKEN in found[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_left_out_unless_asked_for(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    end = raw(kind).token_to_id("<|im_end|>")
    tokens = [*tokenizer.encode("the dog"), end]
    assert "im_end" not in "".join(pieces(tokenizer, tokens, [1]))
    assert "<|im_end|>" in "".join(pieces(tokenizer, tokens, [1], skip=False))


def test_long_output_stays_exact() -> None:
    """What is kept as context is bounded; a thousand tokens must not drift."""
    for kind in KINDS:
        tokenizer = text_tokenizer(kind)
        tokens = tokenizer.encode(" ".join(LINES * 4))
        assert "".join(pieces(tokenizer, tokens, [1])) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(data=st.data())
def test_bytes_of_single_tokens_join_to_the_text(kind: str, data: st.DataObject) -> None:
    """After a first token, which may lose a space: so are log-probabilities shown."""
    tokenizer = text_tokenizer(kind)
    tokens = [token for token in data.draw(any_tokens(tokenizer)) if token not in tokenizer.special_ids]
    first = tokenizer.encode("dog")
    whole = tokenizer.decode_raw([*first, *tokens]).encode()
    joined = tokenizer.decode_raw(first).encode() + b"".join(map(tokenizer.token_bytes, tokens))
    if BROKEN not in whole.decode():
        assert joined == whole


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_single_token_is_shown_as(kind: str) -> None:
    tokenizer = text_tokenizer(kind)
    dog = tokenizer.encode("the dog")[-1]
    assert tokenizer.token_text(dog) == " dog"
    assert tokenizer.token_bytes(dog) == b" dog"
    assert tokenizer.token_text(raw(kind).token_to_id("</s>")) == "</s>"
    assert (tokenizer.token_text(tokenizer.vocab_size), tokenizer.token_bytes(tokenizer.vocab_size)) == ("", b"")
    if kind in WITH_BYTES:
        half = tokenizer.encode("dog🦀")[-1]
        assert tokenizer.token_text(half) == BROKEN
        assert tokenizer.token_bytes(half) == "🦀".encode()[-1:]


def test_the_byte_level_alphabet_is_a_bijection_of_visible_characters() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert all(unicodedata.category(character)[0] not in "CZ" for character in alphabet)
    assert alphabet["Ġ"] == 32

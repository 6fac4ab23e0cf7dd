"""Every kind of tokenizer file gives the ids and the text that transformers and sentencepiece give."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from transformers import AutoTokenizer

from streamkv.errors import ModelLoadError
from streamkv.text.tokenizer import TextTokenizer, load_tokenizer
from tests.text.folders import (
    byte_level_json,
    llama_json,
    sentencepiece_itself,
    spm_files,
    texts,
    vocab_and_merges,
    write,
)
from tests.text.kinds import raw

FAST: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
OPT = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True} | NAMES | {"bos_token": "</s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


def _json(tokenizer: Tokenizer) -> dict[str, str]:
    return {"tokenizer.json": tokenizer.to_str()}


def _with_words() -> Tokenizer:
    """Added tokens that are no bytes of the alphabet; one strips what stands before it."""
    tokenizer = Tokenizer.from_str(raw("byte_level").to_str())
    tokenizer.add_tokens([AddedToken("é日"), AddedToken("🙂🙂", lstrip=True)])
    return tokenizer


def _of_speech() -> Tokenizer:
    tokenizer = Tokenizer.from_str(raw("byte_level").to_str())
    tokenizer.decoder = decoders.CTC()
    return tokenizer


BYTE_LEVEL = _json(raw("byte_level"))

FOLDERS: dict[str, Callable[[], tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "spm llama": lambda: ("llama", LLAMA, spm_files("llama")),
    "spm llama, legacy, with ends": lambda: ("llama", LLAMA | {"legacy": True, "add_eos_token": True}, spm_files("llama")),
    "spm llama, no prefix": lambda: ("llama", LLAMA | {"add_prefix_space": False}, spm_files("llama")),
    "spm llama, no BOS": lambda: ("llama", {"tokenizer_class": "LlamaTokenizer"}, spm_files("llama")),
    "gpt2": lambda: ("gpt2", {"tokenizer_class": "GPT2Tokenizer"} | NAMES, vocab_and_merges()),
    "gpt2, prefix": lambda: ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True} | NAMES, vocab_and_merges()),
    "opt": lambda: ("opt", OPT, vocab_and_merges()),
    "qwen2": lambda: ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<unk>"} | NAMES, vocab_and_merges()),
    "json byte level": lambda: ("llama", FAST, _json(raw("byte_level"))),
    "json llama 3": lambda: ("llama", FAST, _json(byte_level_json())),
    "json byte fallback": lambda: ("llama", FAST, _json(raw("byte_fallback"))),
    "json llama, prepend": lambda: ("llama", FAST, _json(llama_json("prepend"))),
    "json llama, metaspace": lambda: ("llama", LLAMA | NAMES, _json(llama_json("metaspace"))),
    "json gemma": lambda: ("llama", FAST, _json(raw("gemma"))),
    "json unigram": lambda: ("llama", FAST, _json(raw("unigram"))),
    "json wordpiece": lambda: ("llama", FAST, _json(raw("wordpiece"))),
    "json, added words": lambda: ("llama", FAST, _json(_with_words())),
}  # fmt: skip


@cache
def both(name: str) -> tuple[TextTokenizer, Any]:
    """(ours, transformers') of one folder."""
    with TemporaryDirectory() as folder:
        write(Path(folder), *FOLDERS[name]())
        return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=60)
@given(text=texts)
def test_ids_are_those_of_transformers(name: str, text: str) -> None:
    ours, theirs = both(name)
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=40)
@given(data=st.data())
def test_text_is_that_of_transformers(name: str, data: st.DataObject) -> None:
    ours, theirs = both(name)
    tokens = data.draw(st.lists(st.integers(0, len(theirs) - 1), max_size=20))
    for skip in (True, False):
        assert ours.decode(tokens, skip_special_tokens=skip) == theirs.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_those_of_transformers(name: str) -> None:
    ours, theirs = both(name)
    assert set(theirs.all_special_ids) <= ours.special_ids
    for token in theirs.all_special_tokens:
        assert ours.token_text(theirs.convert_tokens_to_ids(token)) == token


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("spm")])
def test_text_between_special_tokens_is_that_of_transformers(name: str) -> None:
    """As a chat template writes it: where a space is put in front, and where not."""
    ours, theirs = both(name)
    for text in ("<s>the dog</s>the dog", "the</s> dog", "<s> the"):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours._control.encode(text, add_special_tokens=False).ids == expected


# -- what the folder says beside the tokenizer ------------------------------------------------------------------------


def special_names(tokenizer: TextTokenizer) -> set[str]:
    return {tokenizer.token_text(index) for index in tokenizer.special_ids}


@pytest.fixture
def files() -> dict[str, str]:
    state = json.loads(raw("byte_level").to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|im_end|>"]
    return {"tokenizer.json": json.dumps(state)}


def _listed(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    } | flags


def test_added_tokens_of_the_configuration_are_added(tmp_path: Path, files: dict[str, str]) -> None:
    size = raw("byte_level").get_vocab_size()
    listed = {"4": _listed("<|im_end|>"), str(size): _listed("<|eot|>"), str(size + 1): _listed("<tool>", special=False)}
    folder = write(tmp_path, "llama", FAST | {"added_tokens_decoder": listed}, files)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert {"<|im_end|>", "<|eot|>"} <= special_names(ours)
    assert ours.vocab_size == size + 2 == len(theirs)
    for text in ("a <tool> b", "x<tool>"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.decode([size, size + 1]) == theirs.decode([size, size + 1], skip_special_tokens=True) == "<tool>"


@pytest.mark.parametrize(
    ("config", "special_map"),
    [
        ({"eos_token": "<|im_end|>"}, {}),
        ({"eos_token": _listed("<|im_end|>") | {"__type": "AddedToken"}}, {}),
        ({"extra_special_tokens": ["<|im_end|>"]}, {}),
        ({"additional_special_tokens": ["<|im_end|>"]}, {}),
        ({}, {"eos_token": {"content": "<|im_end|>", "lstrip": False}}),
        ({}, {"additional_special_tokens": ["<|im_end|>"]}),
    ],
)
def test_tokens_that_are_named_special_are_special(
    tmp_path: Path, files: dict[str, str], config: dict[str, Any], special_map: dict[str, Any]
) -> None:
    folder = write(tmp_path, "llama", FAST | config, files | {"special_tokens_map.json": json.dumps(special_map)})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert "<|im_end|>" in special_names(ours)
    assert 4 not in ours.encode("<|im_end|>")
    assert ours.decode([4, 100]) == theirs.decode([4, 100], skip_special_tokens=True)


def test_a_tokenizer_json_says_itself_what_a_prompt_begins_with(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", FAST | NAMES | {"add_bos_token": True}, _json(raw("byte_level")))
    assert load_tokenizer(folder).encode("dog") == AutoTokenizer.from_pretrained(folder).encode("dog")


def test_a_tokenizer_json_is_used_as_it_is_written(tmp_path: Path) -> None:
    """transformers builds Llama's anew and loses a space at the start; sentencepiece, with which models are trained, does not."""
    folder = write(tmp_path, "llama", LLAMA, _json(llama_json("prepend")))
    ours, trained = load_tokenizer(folder), sentencepiece_itself("llama")
    for text in (" the dog", "  the", "the dog"):
        assert ours.encode(text) == trained.encode(text)
    assert AutoTokenizer.from_pretrained(folder).encode(" the dog") != trained.encode(" the dog")


# -- templates --------------------------------------------------------------------------------------------------------


def _text(tmp_path: Path, config: dict[str, Any], files: dict[str, str], tools: list[dict[str, Any]] | None = None) -> str:
    (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
    tokenizer = load_tokenizer(write(tmp_path, "llama", FAST | config, _json(raw("byte_level")) | files))
    return tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": ""}], tools=tools))


def test_where_templates_are_found(tmp_path: Path) -> None:
    tool = [{"type": "function", "function": {"name": "weather"}}]
    named = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "with {{ tools[0].function.name }}"}]
    assert _text(tmp_path, {}, {"chat_template.json": '{"chat_template": "of a processor"}'}) == "of a processor"
    assert _text(tmp_path, {"chat_template": "of the configuration"}, {}) == "of the configuration"
    assert _text(tmp_path, {"chat_template": named}, {}) == "named"
    assert _text(tmp_path, {"chat_template": named}, {}, tool) == "with weather"
    assert _text(tmp_path, {"chat_template": named}, {"chat_template.jinja": "of the file"}) == "of the file"
    beside = {"additional_chat_templates/tool_use.jinja": "beside {{ tools[0].function.name }}"}
    assert _text(tmp_path, {"chat_template": named}, beside, tool) == "beside weather"


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "config", "match"),
    [
        ({"tokenizer.model": b"\xff\xff\xff"}, {}, "no SentencePiece model"),
        ({"tokenizer.model": b""}, {}, "no SentencePiece model"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, {}, "no SentencePiece model"),  # as tiktoken writes it
        ({"vocab.json": "{}", "merges.txt": ""}, {}, "byte-level"),
        ({"vocab.json": "[", "merges.txt": ""}, {}, "cannot be read"),
        ({"vocab.json": '{"a": 0}'}, {}, "add one of them"),
        (BYTE_LEVEL, {"added_tokens_decoder": {"x": 1}}, "added_tokens_decoder"),
        (BYTE_LEVEL, {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        (BYTE_LEVEL, {"chat_template": [{"name": "rag", "template": "x"}]}, "none named default"),
        (BYTE_LEVEL | {"special_tokens_map.json": "[1"}, {}, "special_tokens_map.json"),
        (_json(_of_speech()), {}, "CTC"),
    ],
)  # fmt: skip
def test_unusable_folders_say_what_is_wrong(tmp_path: Path, files: dict[str, Any], config: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        load_tokenizer(write(tmp_path, "llama", config, files))

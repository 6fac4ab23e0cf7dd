"""Model folders of every kind of tokenizer file, made of tiny tokenizers trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from streamkv.text.spm import from_sentencepiece
from tests.text.kinds import LINES, SPECIAL, raw

_BYTES = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
_GEMMA_WORDS = ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁"]
_MARKUP = ["< s> <s s> < 0x41> <0 x41> <0x4 1> </ s>", "s> <s 0x41> <0x4 1> x41> /s>"] * 20
"""From its pieces the text of control and byte tokens could be merged."""

_TRAINING: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "vocab_size": 420, "split_digits": True, **_BYTES},
    "gemma": {
        "model_type": "bpe", "vocab_size": 450, "add_dummy_prefix": False, "user_defined_symbols": _GEMMA_WORDS,
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **_BYTES,
    },
    "unigram": {"model_type": "unigram", "vocab_size": 200, "hard_vocab_limit": False},
    "unigram_bytes": {"model_type": "unigram", "vocab_size": 420, "hard_vocab_limit": False, **_BYTES},
    "markup": {"model_type": "bpe", "vocab_size": 292, "split_by_unicode_script": False, "split_by_number": False, **_BYTES},
    "markup_unigram": {"model_type": "unigram", "vocab_size": 280, "hard_vocab_limit": False, **_BYTES},
    "word": {"model_type": "word", "vocab_size": 40, "hard_vocab_limit": False},
}  # fmt: skip


@cache
def sentencepiece_model(kind: str) -> bytes:
    """The file that sentencepiece itself writes for a model trained on a few lines."""
    with TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.txt"
        corpus.write_text("\n".join(_MARKUP if kind.startswith("markup") else LINES), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{name}/m", minloglevel=2, character_coverage=0.98, **_TRAINING[kind]
        )
        return (Path(name) / "m.model").read_bytes()


def sentencepiece_itself(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind))


def spm_files(kind: str) -> dict[str, str | bytes]:
    return {"tokenizer.model": sentencepiece_model(kind)}


def write(folder: Path, model_type: str, config: Mapping[str, Any], files: Mapping[str, str | bytes]) -> Path:
    """A folder as AutoTokenizer wants it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def vocab_and_merges() -> dict[str, str]:
    """vocab.json and merges.txt of the byte-level tokenizer."""
    model = json.loads(raw("byte_level").to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "\n".join(["#version: 0.2", *merges])}


def llama_json(style: str) -> Tokenizer:
    """The Llama tokenizer as tokenizer.json: "prepend" with normalizers, as Llama 2's own; "metaspace" as newer ones."""
    with TemporaryDirectory() as name:
        file = Path(name) / "tokenizer.model"
        file.write_bytes(sentencepiece_model("llama"))
        tokenizer, _names = from_sentencepiece(file, add_prefix_space=None, legacy=False, renamed={})
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        state = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def byte_level_json() -> Tokenizer:
    """As Llama 3's: words split by a pattern, whole words looked up first."""
    state = json.loads(raw("byte_level").to_str())
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


_words = [
    *" ".join(LINES[:5]).split(),
    " ",
    "  ",
    "   ",
    "\n",
    "🙂",
    "é",
    "e\u0301",
    "日本",
    "'s",
    "<0x41>",
    "ﬁ",
    "\u00a0",
    "12",
    "▁",
]
texts = st.one_of(
    st.lists(st.sampled_from(_words), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
).filter(lambda text: not any(name in text for name in SPECIAL))
"""Texts in which no name of a special token stands."""

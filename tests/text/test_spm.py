"""SentencePiece models: read as protobuf reads them, converted so that ids and text are sentencepiece's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from sentencepiece import sentencepiece_model_pb2

from streamkv.errors import ModelLoadError
from streamkv.text.spm_file import Kind, Piece, read_spm_file
from streamkv.text.tokenizer import TextTokenizer, load_tokenizer
from tests.text.folders import sentencepiece_itself, sentencepiece_model, spm_files, texts, write


@cache
def loaded(kind: str) -> TextTokenizer:
    with TemporaryDirectory() as folder:
        return load_tokenizer(write(Path(folder), "llama", {}, spm_files(kind)))


def without_known_deviations(kind: str, text: str) -> bool:
    """docs/text.md lists them: a space at the start of Llama's, joiners that a Unigram model normalises, a typed ▁ or <0x41>."""
    if "▁" in text or any(name in text for name in ("<start_of_turn>", "<end_of_turn>", "<pad>")):
        return False
    if kind == "unigram":
        return text.isascii() and "\x00" not in text
    if kind == "unigram_bytes" and "<0x" in text:
        return False
    return kind == "gemma" or not text.startswith(" ")


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram", "unigram_bytes"])
@settings(max_examples=150)
@given(text=texts)
def test_ids_are_those_of_sentencepiece(kind: str, text: str) -> None:
    if without_known_deviations(kind, text):
        assert loaded(kind).encode(text) == sentencepiece_itself(kind).encode(text)


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram_bytes"])
@settings(max_examples=100)
@given(text=texts)
def test_text_is_that_of_sentencepiece(kind: str, text: str) -> None:
    if without_known_deviations(kind, text):
        theirs = sentencepiece_itself(kind)
        assert loaded(kind).decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram", "unigram_bytes", "word"])
def test_the_file_is_read_as_protobuf_reads_it(kind: str) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    ours = read_spm_file(sentencepiece_model(kind))
    assert ours.pieces == [Piece(piece.piece, piece.score, Kind(piece.type)) for piece in proto.pieces]
    assert (ours.model_type, ours.byte_fallback) == (trainer.model_type, trainer.byte_fallback)
    assert (ours.whitespace_as_suffix, ours.charsmap) == (trainer.treat_whitespace_as_suffix, normalizer.precompiled_charsmap)
    assert ours.add_dummy_prefix == normalizer.add_dummy_prefix
    assert ours.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
    assert ours.escape_whitespaces == normalizer.escape_whitespaces
    named = {name: getattr(trainer, f"{name[:3]}_id") for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    assert ours.ids == {name: index for name, index in named.items() if index >= 0}


def test_sentencepieces_own_normalisation_is_kept() -> None:
    theirs, text = sentencepiece_itself("unigram"), "  ＴＨＥ  quick  ﬁsh\u3000dog "
    assert loaded("unigram").encode(text) == theirs.encode(text)


@pytest.mark.parametrize("kind", ["markup", "markup_unigram"])
def test_control_and_byte_tokens_are_never_made_of_text(kind: str) -> None:
    theirs, text = sentencepiece_itself(kind), "a<s> </s><0x41>"
    ids = loaded(kind)._plain.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert not {1, 2, theirs.piece_to_id("<0x41>")} & set(ids)


def test_turns_of_gemma_are_control_tokens() -> None:
    tokenizer = loaded("gemma")
    turn = next(index for index in tokenizer.special_ids if tokenizer.token_text(index) == "<start_of_turn>")
    assert turn not in tokenizer.encode("<start_of_turn>")


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_sentencepiece_model_of_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="only BPE and Unigram"):
        load_tokenizer(write(tmp_path, "llama", {}, spm_files("word")))


def test_broken_sentencepiece_models_are_refused_or_work(tmp_path: Path) -> None:
    draw, whole = Random(0), sentencepiece_model("unigram")
    refused = 0
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        try:
            load_tokenizer(tmp_path).encode("the  dog ﬁ 🙂")
        except ModelLoadError:
            refused += 1
    assert 50 < refused < 150


def test_an_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", {}, spm_files("llama"))
    with (folder / "tokenizer.model").open("r+b") as file:
        file.truncate(64 * 1024 * 1024 + 1)  # a hole: it takes no space
    with pytest.raises(ModelLoadError, match="64 MiB"):
        load_tokenizer(folder)

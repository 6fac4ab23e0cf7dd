"""A SentencePiece model file as a `tokenizers` tokenizer.

The file says how its text is split, normalised and joined; two settings of the folder change it, as in transformers'
LlamaTokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from streamkv.errors import ModelLoadError
from streamkv.text.spm_file import Kind, SpmFile, read_spm_file

__all__ = ["from_sentencepiece"]

_MAX_BYTES: Final = 64 * 1024 * 1024
_MAX_PIECE: Final = 512
_UNIGRAM, _BPE = 1, 2
_SPACE: Final = "▁"
_TURNS: Final = frozenset({"<start_of_turn>", "<end_of_turn>"})
"""Gemma's control tokens, which its file calls user-defined words."""

_NEVER: Final = -1e6
"""Score of pieces that SentencePiece does not find in text, far below all others."""

log = structlog.get_logger(__name__)


def from_sentencepiece(
    file: Path, *, add_prefix_space: bool | None, legacy: bool, renamed: dict[int, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Convert.

    Args:
        add_prefix_space: put a space before the first word; None = as the file says.
        legacy: after every special token too.
        renamed: token ids whose text the folder changes (a placeholder that became a special token).

    Returns:
        The tokenizer, and the names of its special tokens (`bos_token` ...).

    Raises:
        ModelLoadError: the file is no SentencePiece model, or of a kind that is not served.
    """
    spm = _read(file)
    spm = replace(spm, pieces=[replace(piece, text=renamed.get(index, piece.text)) for index, piece in enumerate(spm.pieces)])
    prefix = spm.add_dummy_prefix if add_prefix_space is None else add_prefix_space
    try:
        tokenizer = _converted(spm, prefix=prefix, legacy=legacy)
    except Exception as error:  # the library raises bare exceptions
        log.warning("sentencepiece_conversion_failed", error=repr(error))
        raise ModelLoadError(f"{file} is a broken SentencePiece model") from error
    return tokenizer, {name: spm.pieces[index].text for name, index in spm.ids.items()}


def _read(file: Path) -> SpmFile:
    if file.stat().st_size > _MAX_BYTES:
        raise ModelLoadError(f"{file} is larger than 64 MiB")
    try:
        spm = read_spm_file(file.read_bytes())
    except (ValueError, TypeError) as error:
        raise ModelLoadError(f"{file} is no SentencePiece model; add the model's tokenizer.json") from error
    if not spm.pieces:
        raise ModelLoadError(f"{file} is no SentencePiece model; add the model's tokenizer.json")
    if spm.model_type not in {_UNIGRAM, _BPE} or spm.whitespace_as_suffix or not spm.escape_whitespaces:
        raise ModelLoadError(f"{file} is a SentencePiece model of a kind that is not served; only BPE and Unigram are")
    if "unk_token" not in spm.ids or max(len(piece.text) for piece in spm.pieces) > _MAX_PIECE:
        raise ModelLoadError(f"{file} has no unknown piece, or pieces of more than {_MAX_PIECE} characters")
    return spm


def _converted(spm: SpmFile, *, prefix: bool, legacy: bool) -> Tokenizer:
    is_bpe = spm.model_type == _BPE
    tokenizer = Tokenizer(_bpe(spm) if is_bpe else _unigram(spm))
    tokenizer.normalizer = _normalizer(spm)
    where = "first" if is_bpe and not legacy else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, where if prefix else "never", split=not is_bpe)
    tokenizer.decoder = _decoder(prefix, spm.byte_fallback)
    marks = [piece for piece in spm.pieces if piece.kind in {Kind.CONTROL, Kind.USER_DEFINED}]
    tokenizer.add_tokens(
        [AddedToken(piece.text, normalized=False, special=piece.kind is Kind.CONTROL or piece.text in _TURNS) for piece in marks]
    )
    return tokenizer


def _bpe(spm: SpmFile) -> models.BPE:
    """Any two pieces that make a third are merged, the best score first."""
    ids = {piece.text: index for index, piece in enumerate(spm.pieces)}
    words = [piece for piece in spm.pieces if piece.kind in {Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED}]
    texts = {piece.text for piece in words}
    merges = sorted(
        (-piece.score, ids[piece.text[:cut]], ids[piece.text[cut:]], piece.text[:cut], piece.text[cut:])
        for piece in words
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in texts and piece.text[cut:] in texts
    )
    pairs = [(left, right) for *_, left, right in merges]
    unknown = spm.pieces[spm.ids["unk_token"]].text
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=spm.byte_fallback)


def _unigram(spm: SpmFile) -> models.Unigram:
    scored = [(piece.text, _NEVER if piece.kind is Kind.BYTE else piece.score) for piece in spm.pieces]
    return models.Unigram(scored, spm.ids["unk_token"], spm.byte_fallback)


def _normalizer(spm: SpmFile) -> normalizers.Normalizer | None:
    steps: list[normalizers.Normalizer] = []
    if spm.charsmap:
        steps.append(normalizers.Precompiled(spm.charsmap))
    if spm.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps) if steps else None


def _decoder(prefix: bool, byte_fallback: bool) -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            *([decoders.ByteFallback()] if byte_fallback else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )

"""What the files of a model folder say about its text: tokenizer, special tokens, chat templates; as AutoTokenizer reads them.

One difference is meant: a tokenizer.json is used as it is written. transformers builds some classes (Llama, Gemma, GPT-2, Qwen2)
anew from its vocabulary, and for a few folders other tokens come out of that than the model was trained with (docs/text.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from streamkv.errors import ModelLoadError
from streamkv.text.detokenizer import byte_level_alphabet
from streamkv.text.spm import from_sentencepiece

__all__ = ["TextFiles", "read_text_files"]

_MAX_JSON: Final = 16 * 1024 * 1024
_SPM_FILES: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Of transformers' Qwen2Tokenizer (Apache-2.0), which also comes as vocab.json and merges.txt.
_QWEN2_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What was read.

    Attributes:
        special_tokens: names that a template may use (`bos_token`) and their text.
        templates: sources of the chat templates by name, "default" and others.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    templates: dict[str, str]


def read_text_files(folder: Path) -> TextFiles:
    """Read everything.

    Raises:
        ModelLoadError: the folder has no usable tokenizer.
    """
    config = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older folders say it in a file of its own
        config |= {name: value for name, value in _read_object(folder / "special_tokens_map.json").items() if value}
    file = folder / "tokenizer.json"
    tokenizer, names = (_from_json(file), {}) if file.is_file() else _converted(folder, config)
    names |= {name: _content(value) for name, value in config.items() if name.endswith("_token") and _is_token(value)}
    _add_tokens(tokenizer, config, names)
    if not file.is_file():
        _add_ends(tokenizer, config, names)
    return TextFiles(tokenizer, names, _templates(folder, config))


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > _MAX_JSON:
        raise ModelLoadError(f"{file} is larger than 16 MiB")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"{file} is no JSON object") from error


# -- tokenizers -------------------------------------------------------------------------------------------------------


def _from_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        log.warning("tokenizer_load_failed", error=repr(error))
        raise ModelLoadError(f"{file} cannot be read as a tokenizer") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _converted(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """From the files that came before tokenizer.json."""
    for name in _SPM_FILES:
        if (folder / name).is_file():
            renamed = {index: token.content for index, token in _listed_tokens(config)}
            prefix, legacy = config.get("add_prefix_space"), bool(config.get("legacy"))
            return from_sentencepiece(folder / name, add_prefix_space=prefix, legacy=legacy, renamed=renamed)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level(folder, config)
    raise ModelLoadError(
        f"{folder} has no tokenizer.json, tokenizer.model (SentencePiece), or vocab.json and merges.txt; add one of them"
    )


def _byte_level(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """vocab.json and merges.txt of GPT-2, OPT and Qwen2."""
    try:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        model = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    except Exception as error:  # the library raises bare exceptions
        raise ModelLoadError(f"{folder}: vocab.json and merges.txt cannot be read as a BPE tokenizer") from error
    if not byte_level_alphabet().keys() <= vocabulary.keys():
        raise ModelLoadError(f"{folder}: vocab.json is not byte-level as GPT-2's; add the model's tokenizer.json")
    tokenizer = Tokenizer(model)
    prefix = bool(config.get("add_prefix_space"))
    if str(config.get("tokenizer_class", "")).startswith("Qwen2"):
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(prefix)
    tokenizer.decoder = decoders.ByteLevel()
    usual = "<|endoftext|>"
    return tokenizer, {name: usual for name in ("bos_token", "eos_token", "unk_token") if usual in vocabulary}


# -- special tokens ---------------------------------------------------------------------------------------------------


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _added(value: Any, *, special: bool) -> AddedToken:
    """A token as configurations write it: its text, or its text and flags."""
    if not isinstance(value, dict):
        return AddedToken(str(value), special=special, normalized=False)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    flags = {name: bool(value[name]) for name in names if name in value}
    return AddedToken(_content(value), special=bool(value.get("special", special)), **flags)


def _listed_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    listed = config.get("added_tokens_decoder") or {}
    try:
        return sorted(((int(index), _added(token, special=False)) for index, token in listed.items()), key=lambda item: item[0])
    except (AttributeError, KeyError, ValueError) as error:
        raise ModelLoadError("added_tokens_decoder of tokenizer_config.json must map token ids to tokens") from error


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Make what the configuration lists and names special tokens, where the tokenizer does not know them yet."""
    known = {(token.content, token.special) for token in tokenizer.get_added_tokens_decoder().values()}
    for index, token in _listed_tokens(config):
        if (token.content, token.special) not in known:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            log.warning("added_token_has_another_id", token=token.content, listed=index, id=tokenizer.token_to_id(token.content))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [config.get(name, names.get(name)) for name in _NAMED]
    wanted = [_added(value, special=True) for value in (*named, *extra) if _is_token(value)]
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens([token for token in wanted if token.content not in special])


def _add_ends(tokenizer: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """What a prompt begins and ends with. A tokenizer.json says it itself, and there the configuration does not count."""
    begin, end = (names.get(f"{name}_token") if config.get(f"add_{name}_token") else None for name in ("bos", "eos"))
    marks = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token]
    single = [*([begin] if begin else []), "$A", *([end] if end else [])]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(dict.fromkeys(marks)))


# -- templates --------------------------------------------------------------------------------------------------------


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files come before the configuration, and a name of its own after `default`."""
    found = _listed_templates(config.get("chat_template") or _read_object(folder / "chat_template.json").get("chat_template"))
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    try:
        return found | {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except ValueError as error:
        raise ModelLoadError(f"{folder}: a chat template is no UTF-8 text") from error


def _listed_templates(value: object) -> dict[str, str]:
    """One template, or a list of `{"name", "template"}`."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    named = [item for item in value if isinstance(item, dict)]
    return {str(item.get("name")): item["template"] for item in named if isinstance(item.get("template"), str)}

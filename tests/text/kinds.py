"""Small tokenizers of the four kinds that models use, trained here on a few lines; each reads and writes differently."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from streamkv.text.template import ChatTemplate
from streamkv.text.tokenizer import TextTokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

LINES = [
    "the quick brown fox jumps over the lazy dog, and the dog says: don't!",
    "Blocks are shared; a block is full or it is not. 0123456789 (3 + 4 = 7)",
    "über die Brücke — façade, naïve, Ångström, Ελληνικά, Русский язык",
    "日本語のテキスト、中文文本、한국어 텍스트 🙂 👩‍👩‍👧 🇨🇭 e\u0301",
    "    indented\tand\n\nnewlines\r\n  twice  spaced ",
] * 4

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

KINDS = ("byte_level", "byte_fallback", "wordpiece", "unigram", "gemma", "prefix_space", "odd_words")


@cache
def raw(kind: str) -> Tokenizer:
    """The library's tokenizer of one kind; do not change it."""
    return {
        "byte_level": _byte_level,
        "byte_fallback": _byte_fallback,
        "wordpiece": _wordpiece,
        "unigram": _unigram,
        "gemma": _gemma,
        "prefix_space": _prefix_space,
        "odd_words": _odd_words,
    }[kind]()


@cache
def text_tokenizer(kind: str) -> TextTokenizer:
    """The same, as streamkv uses it, with a ChatML template."""
    return TextTokenizer(raw(kind), template=ChatTemplate(CHATML), special_tokens={"bos_token": "<s>"})


def _special() -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in SPECIAL]


def _byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes in a printable alphabet; the decoder joins bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=_special(), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: ▁ for spaces, `<0x..>` for what is not in the vocabulary, the first space stripped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    # Only the Latin line: everything else must fall back to bytes.
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*_special(), *alphabet], show_progress=False)
    tokenizer.train_from_iterator(LINES[:2], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    """As BERT: lower case, `##` for the inside of a word, spaces made up and cleaned up by the decoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=_special(), show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    """As T5 and XLNet: ▁ in front of every word, the first one's stripped by the decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=_special(), unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _gemma() -> Tokenizer:
    """As Gemma: spaces replaced by a normalizer, bytes for what is not in the vocabulary, nothing stripped or put in front."""
    tokenizer = Tokenizer.from_str(_byte_fallback().to_str())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _prefix_space() -> Tokenizer:
    """As GPT-2 with add_prefix_space: the first word has a space of its own."""
    tokenizer = Tokenizer.from_str(_byte_level().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _odd_words() -> Tokenizer:
    """Byte level with added words that are no bytes of its alphabet, or only by chance."""
    tokenizer = Tokenizer.from_str(_byte_level().to_str())
    tokenizer.add_tokens([AddedToken("é"), AddedToken("日本 語"), AddedToken("Ġ🙂")])
    tokenizer.add_special_tokens([AddedToken("«é»", special=True), AddedToken("<|🦀|>", special=True)])
    return tokenizer

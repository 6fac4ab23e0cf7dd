"""A tiny model with a tokenizer and a chat template, for commands that load one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from streamkv.text.detokenizer import byte_level_alphabet
from tests.runner.tiny import VOCAB, save_tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    byte_tokenizer(VOCAB).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """One token a byte, whose id is the byte, then made-up words that no text contains."""
    words = {f"Ġw{index}": index for index in range(256, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=byte_level_alphabet() | words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def no_log_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets up logging for its process; here that would outlive the test and its captured stderr."""
    monkeypatch.setattr("streamkv.cli.generate.configure_logs", lambda **_: None)

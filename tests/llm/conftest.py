"""One tiny model with a tokenizer, and one `LLM` over it, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamkv import LLM
from tests.runner.tiny import save_tiny
from tests.text.kinds import CHATML, raw

SETTINGS: dict[str, Any] = {"backend": "torch", "dtype": "float32", "num_blocks": 128, "block_size": 8, "max_model_len": 256}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a tiny random Llama with 512 logits, a byte-level tokenizer of fewer, a ChatML template."""
    path = save_tiny(tmp_path_factory.mktemp("model"), vocab_size=512)
    raw("byte_level").save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.fixture(scope="session")
def shared(folder: Path) -> Iterator[LLM]:
    """Loaded once; tests must leave nothing running in it."""
    with LLM(str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared one, with the proof that the test has left nothing behind."""
    yield shared
    assert shared._engine.streams.num_open == 0

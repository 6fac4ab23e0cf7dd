"""One tiny model with a tokenizer, and one `LLM` over it, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamkv import LLM
from tests.runner.tiny import save_talking

SETTINGS: dict[str, Any] = {"backend": "torch", "dtype": "float32", "num_blocks": 128, "block_size": 8, "max_model_len": 256}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking(tmp_path_factory.mktemp("model"))


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

"""Every asynchronous test of the server runs on both event loops that `streamkv serve --loop` offers; some on a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from streamkv.server.app import Server
from streamkv.server.config import ServerConfig

if TYPE_CHECKING:
    from streamkv import Engine


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runner.tiny import save_talking  # and with it torch, which most tests here do without

    return save_talking(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def real(folder: Path) -> AsyncIterator[tuple[str, Engine]]:
    """Host and port of a server over a tiny real model, and its engine to compare with."""
    from streamkv import Engine
    from streamkv.engine.config import EngineConfig

    async with Engine(EngineConfig(model=str(folder), num_blocks=128, block_size=8, max_model_len=256)) as engine:
        server = Server(engine.streams, ServerConfig(port=0))
        async with server.listening():
            yield f"127.0.0.1:{server.port}", engine

"""What a server says when it cannot listen: one sentence, no traceback."""

from __future__ import annotations

import socket

import pytest

from streamkv.errors import ConfigError
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from tests.server.serving import serving


async def listen(server: Server) -> None:
    async with server.listening():
        raise AssertionError("it listens")


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with serving() as running:
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use; choose another"):
                await listen(Server(running.streams, ServerConfig(port=port)))


async def test_an_address_of_another_machine_is_refused() -> None:
    async with serving() as running:
        with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
            await listen(Server(running.streams, ServerConfig(host="192.0.2.1", port=0, insecure_no_auth=True)))


@pytest.mark.parametrize("setting", [{"port": -1}, {"port": 65536}, {"max_connections": 0}], ids=str)
async def test_settings_out_of_bounds_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ServerConfig(**setting)

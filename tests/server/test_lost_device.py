"""A server whose device is lost: every stream is told once, nobody is sent there any more, and the process ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from streamkv.server.watchdog import EXIT_STATUS
from tests.server.losing_backend import VARIABLE
from tests.server.serving import DEADLINE_S
from tests.server.test_processes import Served, model, serve

__all__ = ["model"]  # a fixture

NAMES = [f"s{number}" for number in range(6)]


async def lose(served: Served, file: Path) -> tuple[list[dict[str, Any]], int | None, str]:
    """Everything that a client gets after the loss, its close code, and what `/ready` says by then."""
    address = served.url.replace("ws://", "http://").replace("/v1/stream", "/ready")
    messages: list[dict[str, Any]] = []
    async with aiohttp.ClientSession() as http, http.ws_connect(served.url, protocols=("streamkv.v1.json",)) as socket:
        await socket.send_str('{"t": "hello"}')
        for name in NAMES:
            body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
            await socket.send_str(msgspec.json.encode({"t": "create", "id": name, "api": "completions", "body": body}).decode())
        ready = ""
        async for frame in socket:
            message = msgspec.json.decode(frame.data)
            if message["t"] == "delta" and not file.exists():
                file.touch()
            if message["t"] == "error" and not ready:
                async with http.get(address) as answer:
                    ready = f"{answer.status} {(await answer.json())['status']}"
            messages.append(message)
        return messages, socket.close_code, ready


@pytest.mark.parametrize("look_ahead", [True, False])
def test_every_stream_is_told_once_and_the_process_ends_with_the_status_that_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_ahead: bool
):
    file = tmp_path / "lost"
    monkeypatch.setenv(VARIABLE, str(file))
    options = ["--backend", "tests.server.losing_backend:LosingBackend", "--max-num-seqs", "4"]  # so that two wait
    with serve(model, *options, *([] if look_ahead else ["--no-look-ahead"])) as served:

        async def session() -> tuple[list[dict[str, Any]], int | None, str]:
            async with asyncio.timeout(DEADLINE_S):
                return await lose(served, file)

        messages, close_code, ready = asyncio.run(session())
        assert served.process.wait(DEADLINE_S) == EXIT_STATUS
    ends = [message for message in messages if message["t"] in ("done", "error")]
    assert Counter(end["id"] for end in ends) == dict.fromkeys(NAMES, 1)
    assert {(end["t"], end.get("code"), end.get("retryable")) for end in ends} == {("error", "engine_lost", True)}
    assert ready == "503 engine_lost"
    assert close_code == 1001

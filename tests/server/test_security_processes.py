"""`streamkv serve` as it is started: what it refuses to start with, and that it goes when it can no longer serve."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from streamkv.client import ClientConnectionError, connect
from streamkv.server.app import run_until_signalled
from streamkv.server.watchdog import EXIT_STATUS
from tests.server.hanging_backend import VARIABLE
from tests.server.serving import DEADLINE_S, serving
from tests.server.test_processes import model
from tests.server.wire import KEYS, keys_text

__all__ = ["model"]  # the fixture


def refusal(*options: str, **environment: str) -> str:
    """What it says before it ends with status 1."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("STREAMKV_")}
    done = subprocess.run(
        [sys.executable, "-m", "streamkv", "serve", "--port", "0", *options],
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("streamkv: ")
    assert done.stderr.count("\n") == 1, "one sentence"
    return done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_does_not_start_for_others_without_a_key(host: str):
    said = refusal("--host", host)
    assert "--api-keys" in said
    assert "STREAMKV_API_KEY" in said


def test_it_does_not_start_with_files_of_no_use(tmp_path: Path):
    assert "nothing.toml" in refusal("--api-keys", str(tmp_path / "nothing.toml"))
    (tmp_path / "keys.toml").write_text("[[keys]]\ntenant = 5\n")
    assert "keys[0].tenant" in refusal("--api-keys", str(tmp_path / "keys.toml"))
    assert "16 visible" in refusal("--host", "0.0.0.0", STREAMKV_API_KEY="short")
    assert "short" not in refusal(STREAMKV_ADMIN_KEY="short").replace("too short", "")
    assert "nothing.pem" in refusal("--tls-cert", str(tmp_path / "nothing.pem"), "--tls-key", str(tmp_path / "x"))
    assert "both" in refusal("--tls-cert", str(tmp_path / "nothing.pem"))


def test_a_hung_server_with_keys_ends_by_itself(model: Path, tmp_path: Path):
    """The whole of it: a key from the environment and one from a file, and a forward pass that never returns."""
    (tmp_path / "keys.toml").write_text(keys_text(["rival"]))
    hang = tmp_path / "hang"
    command = [sys.executable, "-m", "streamkv", "serve", str(model), "--port", "0", "--num-blocks", "64"]
    command += ["--served-model-name", "tiny", "--watchdog", "2", "--api-keys", str(tmp_path / "keys.toml")]
    command += ["--backend", "tests.server.hanging_backend:HangingBackend"]
    environment = os.environ | {"STREAMKV_API_KEY": KEYS["acme"], VARIABLE: str(hang)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split("--url ")[1].strip()
        asyncio.run(_talk_until_it_hangs(url, hang))
        _, said = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert process.returncode == EXIT_STATUS
    assert "streamkv: watchdog: one step of the engine has taken" in said
    assert "hanging_backend.py" in said
    assert KEYS["acme"] not in said


async def _talk_until_it_hangs(url: str, hang: Path) -> None:
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ClientConnectionError):
            async with connect(url):
                pass
        for tenant in ("acme", "rival"):
            async with connect(url, api_key=KEYS[tenant]) as client:
                await client.complete("abc", max_tokens=3).result()
        hang.touch()
        completions = url.replace("ws://", "http://").replace("/stream", "/completions")
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEYS['acme']}"}) as http:
            with pytest.raises(aiohttp.ClientError):
                await http.post(completions, json={"model": "tiny", "prompt": "abc"})


async def test_a_server_whose_engine_is_lost_ends_instead_of_answering_503_for_ever():
    async with serving() as served:
        server, ready = served.server, asyncio.Event()
        running = asyncio.create_task(run_until_signalled(server, ready=ready))
        await ready.wait()
        await served.engine._batches.put(None)
        async with asyncio.timeout(DEADLINE_S):
            assert await running is False


def test_the_commands_health_check_needs_no_key():
    """What Dockerfile and compose ask is public."""
    root = Path(__file__).resolve().parents[2]
    for name in ("Dockerfile", "compose.yaml"):
        assert "/ready" in (root / name).read_text()

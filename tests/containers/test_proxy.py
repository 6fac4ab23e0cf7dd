"""docs/deploy.md's nginx before a real server: encrypted, token by token."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.server.serving import DEADLINE_S, Serving, serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
KEY = "a-clients-key-of-a-test-0123456789"
NAME = "chat.example.org"
HEADERS = {"Authorization": f"Bearer {KEY}", "Host": NAME, "Origin": f"https://{NAME}"}

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nginx") is None, reason="SKIPPED LOUDLY: no `nginx` here (Debian: apt-get install nginx-light)"
    ),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="SKIPPED LOUDLY: no `openssl` here"),
]


def configuration(folder: Path, port: int, target: int) -> Path:
    """The page's, for other ports and files."""
    (server,) = re.findall(r"^```nginx\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/chat.pem", str(folder / "chat.pem")),
        ("/etc/ssl/chat.key", str(folder / "chat.key")),
        ("http://127.0.0.1:8000", f"http://127.0.0.1:{target}"),
    ):
        assert server.count(old) == 1, old
        server = server.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off;\nmaster_process off;\npid {folder / 'pid'};\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}{server}}}\n"
    )
    return path


@asynccontextmanager
async def proxied(folder: Path, target: int) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """nginx before that port: its address, and what to trust."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-keyout", "chat.key", "-out", "chat.pem", "-subj", f"/CN={NAME}", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    nginx = await asyncio.create_subprocess_exec(
        *("nginx", "-p", str(folder), "-e", "stderr", "-c", str(configuration(folder, port, target))),
        stdout=sys.stderr,
        stderr=sys.stderr,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    assert nginx.returncode is None, "nginx refuses its configuration"
                    await asyncio.sleep(0.02)
        writer.close()
        yield f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=folder / "chat.pem")
    finally:
        if nginx.returncode is None:
            nginx.terminate()
        await nginx.wait()


def behind() -> AbstractAsyncContextManager[Serving]:
    """In its container the server listens for others and lets the proxy decide about names; on loopback it wants to be told."""
    return serving(api_key=KEY, allowed_hosts=frozenset({NAME}))


async def test_a_websocket_through_the_proxy_comes_token_by_token(tmp_path: Path):
    async with behind() as served, proxied(tmp_path, served.server.port) as (base, trusted):
        served.engine.hold = 3
        url = base + "/v1/stream"
        async with served.http.ws_connect(url, protocols=["streamkv.v1.json"], ssl=trusted, headers=HEADERS) as ws:
            await ws.send_json({"t": "hello"})
            await ws.send_json({"t": "create", "id": "s", "api": "completions", "body": {"prompt": "abc", "max_tokens": 9}})
            tokens = 0
            async with asyncio.timeout(DEADLINE_S):
                while (message := await ws.receive_json())["t"] != "done":
                    tokens += message.get("n", 0) if message["t"] == "delta" else 0
                    if tokens == 3:  # which have come, though the answer has no end yet
                        await served.engine.release()
            assert tokens == 9


async def test_events_through_the_proxy_are_not_held_back(tmp_path: Path):
    async with behind() as served, proxied(tmp_path, served.server.port) as (base, trusted):
        served.engine.hold = 1
        async with served.http.get(base + "/v1/models", ssl=trusted, headers=HEADERS) as models:
            model = (await models.json())["data"][0]["id"]
        body = {"model": model, "prompt": "abc", "max_tokens": 2, "stream": True}
        async with (
            asyncio.timeout(DEADLINE_S),
            served.http.post(base + "/v1/completions", json=body, ssl=trusted, headers=HEADERS) as answer,
        ):
            first = await answer.content.readuntil(b"\n\n")
            assert first.startswith(b"data: {")
            await served.engine.release()
            assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")


async def test_the_proxy_passes_keys_on_and_hides_the_metrics(tmp_path: Path):
    async with behind() as served, proxied(tmp_path, served.server.port) as (base, trusted):

        async def status(path: str, **headers: str) -> int:
            async with served.http.get(base + path, ssl=trusted, headers=headers) as answer:
                return answer.status

        assert await status("/v1/models", Host=NAME) == 401
        assert await status("/v1/models", **HEADERS) == 200
        assert await status("/v1/models", **HEADERS | {"Origin": "https://elsewhere.example"}) == 403
        assert await status("/metrics", **HEADERS) == 404
        async with served.http.get(base.replace("https:", "http:") + "/ready", headers={"Host": NAME}) as plain:
            assert plain.status == 400, "not encrypted"

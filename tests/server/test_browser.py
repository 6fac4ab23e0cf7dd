"""A real browser: what a page of an allowed origin can do, what another page cannot, and tickets for WebSockets.

Needs Chromium; without it these tests are skipped, loudly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.server.serving import DEADLINE_S, Serving
from tests.server.wire import KEYS, keyed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PAGE = """<!doctype html><meta charset="utf-8"><script type="module">
const at = new URLSearchParams(location.search).get("server");
const key = {"Authorization": "Bearer %s"};
// What openai-js sends with every request besides, from a browser too.
const stainless = {"X-Stainless-Lang": "js", "X-Stainless-Timeout": "600", "Idempotency-Key": "k"};
const post = (path, body, headers) => fetch(`http://${at}${path}`, {
  method: "POST", headers: {"Content-Type": "application/json", ...headers}, body: JSON.stringify(body)});
const attempt = async (work) => { try { return await work(); } catch (error) { return String(error); } };
const ticket = async () => {
  try { return (await (await post("/v1/ws-tickets", {}, key)).json()).ticket; } catch { return "none"; }
};
const greet = (query, protocols, hello) => new Promise((resolve) => {
  const socket = new WebSocket(`ws://${at}/v1/stream${query}`, protocols);
  socket.onopen = () => socket.send(JSON.stringify({t: "hello", ...hello}));
  socket.onmessage = (event) => { resolve([JSON.parse(event.data).t, socket.protocol]); socket.close(); };
  socket.onclose = (event) => resolve(event.code);
});
const said = {};
said.chat = await attempt(async () => {
  const body = {messages: [{role: "user", content: "hello"}], max_tokens: 5, stream: true};
  const answer = await post("/v1/chat/completions", body, {...key, ...stainless});
  const text = await answer.text();
  return [answer.status, answer.headers.get("X-Request-Id").length, text.trim().endsWith("data: [DONE]")];
});
said.own_id = await attempt(async () => {
  const answer = await post("/tokenize", {prompt: "abc"}, {...key, "X-Request-Id": "mine-1"});
  return [(await answer.json()).tokens, answer.headers.get("X-Request-Id")];
});
said.no_key = await attempt(async () => {
  const answer = await post("/tokenize", {prompt: "abc"}, {});
  return [answer.status, (await answer.json()).error.code];
});
said.too_many = await attempt(async () => {
  const answer = await post("/v1/completions", {prompt: "abc", max_tokens: 1}, key);
  return [answer.status, (await answer.json()).error.code, Number(answer.headers.get("Retry-After")) > 0];
});
said.models = await attempt(async () => (await (await fetch(`http://${at}/v1/models`, {headers: key})).json()).data[0].id);
said.nowhere = await attempt(async () => (await fetch(`http://${at}/v1/nothing`, {headers: key})).status);
said.simple = await attempt(async () => {
  const answer = await fetch(`http://${at}/v1/completions`, {method: "POST", mode: "no-cors", body: '{"prompt": "abc"}'});
  return answer.type;
});
const json = "streamkv.v1.json";
const used = await ticket();
said.ticket = await greet(`?ticket=${used}`, [json], {});
said.used = await greet(`?ticket=${used}`, [json], {});
said.in_protocol = await greet("", [json, `streamkv.ticket.${await ticket()}`], {});
said.in_hello = await greet("", [json], {token: await ticket()});
said.nothing = await greet("", [json], {});
await fetch("/said", {method: "POST", body: JSON.stringify(said)});
</script>"""


@asynccontextmanager
async def page() -> AsyncIterator[tuple[int, asyncio.Future[dict[str, Any]]]]:
    """A server for the page alone: its port, and what the page will say."""
    said: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def show(_request: web.Request) -> web.Response:
        return web.Response(text=PAGE % KEYS["acme"], content_type="text/html")

    async def hear(request: web.Request) -> web.Response:
        said.set_result(json.loads(await request.read()))
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/", show), web.post("/said", hear)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1], said
    finally:
        await runner.cleanup()


@asynccontextmanager
async def browser(folder: Path, url: str) -> AsyncIterator[None]:
    if CHROMIUM is None:
        warnings.warn("chromium IS NOT INSTALLED: nothing has been seen by a browser", stacklevel=3)
        pytest.skip("chromium IS NOT INSTALLED: nothing has been seen by a browser")
    # No sandbox: the tests' own page is all that it sees, and in a container it often cannot have one.
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}")
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *options, url, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def seen(folder: Path, served: Serving, port: int, said: asyncio.Future[dict[str, Any]], host: str) -> dict[str, Any]:
    async with browser(folder, f"http://{host}:{port}/?server=127.0.0.1:{served.server.port}"):
        return await asyncio.wait_for(said, DEADLINE_S)


QUOTA = "\n[tenants.acme]\nrequests_per_s = 0.001\n"


async def test_a_page_of_an_allowed_origin_can_use_everything(tmp_path: Path):
    async with (
        page() as (port, said),
        keyed(tmp_path, more=QUOTA, allowed_origins=frozenset({f"http://127.0.0.1:{port}"})) as served,
    ):
        assert await seen(tmp_path / "profile", served, port, said, "127.0.0.1") == {
            "chat": [200, 24, True],
            "own_id": [[97, 98, 99], "mine-1"],
            "no_key": [401, "unauthorized"],
            "too_many": [429, "rate_limited", True],
            "models": "fake",
            "nowhere": "TypeError: Failed to fetch",  # a path that is not there lets nobody ask
            "simple": "opaque",
            "ticket": ["welcome", "streamkv.v1.json"],
            "used": 1006,
            "in_protocol": ["welcome", "streamkv.v1.json"],
            "in_hello": ["welcome", "streamkv.v1.json"],
            "nothing": 4401,
        }
        assert len(served.engine.requests) == 1, "more than the chat"


async def test_a_page_of_another_origin_can_do_nothing(tmp_path: Path):
    """The same page under another name: every request is refused by the server, and none of its answers can be read."""
    async with (
        page() as (port, said),
        keyed(tmp_path, allowed_origins=frozenset({f"http://127.0.0.1:{port}"})) as served,
    ):
        failed = "TypeError: Failed to fetch"
        assert await seen(tmp_path / "profile", served, port, said, "localhost") == {
            **dict.fromkeys(("chat", "own_id", "no_key", "too_many", "models", "nowhere"), failed),
            "simple": "opaque",
            **dict.fromkeys(("ticket", "used", "in_protocol", "in_hello", "nothing"), 1006),
        }
        assert not served.engine.requests

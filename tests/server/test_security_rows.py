"""What belongs to no other file: rows of docs/security.md, and that every test named there exists."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Raw, serving
from tests.server.wire import KEYS, ask, bearer, keyed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def functions_of(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    return {
        node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def named() -> list[tuple[str, str]]:
    """(file, test) for everything in the page's tables that looks like one."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_test_that_the_page_names_exists() -> None:
    assert len(named()) > 40
    for file, test in named():
        assert test in functions_of(ROOT / file), f"{file}::{test}"


def test_every_row_of_the_page_names_a_test_or_says_that_there_is_none() -> None:
    tables = PAGE[PAGE.index("## What has happened") :]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert "::" in cells[2] or cells[2].startswith("none:"), row


def test_the_page_names_every_code_and_every_limit() -> None:
    from streamkv.server.config import HttpLimits, ServerConfig
    from tests.server.test_security_leak import CODES

    for code in CODES:
        assert f"`{code}`" in PAGE, code
    limits = HttpLimits()
    for value in (limits.head_s, limits.body_s, limits.keepalive_s, limits.headers, ServerConfig().max_unauthenticated):
        assert re.search(rf"\b{value:g}\b", PAGE), value


def test_every_option_that_the_pages_name_exists() -> None:
    import argparse

    from streamkv.cli import serve

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    known = set(parser._option_string_actions) | {"--admin"}
    for page in (PAGE, (ROOT / "docs" / "operations.md").read_text()):
        assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known


# -- the server fetches nothing ----------------------------------------------------------------------------------------

_seen: list[Any] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in ("socket.connect", "socket.getaddrinfo"):
        _seen.append(arguments)


@pytest.fixture
def connections() -> Any:
    """Every address that this process connects to or looks up."""
    global _seen  # noqa: PLW0603  # an audit hook cannot be removed, only told to look away
    if not getattr(sys, "_streamkv_hook", False):
        sys.addaudithook(_hook)
        sys._streamkv_hook = True  # type: ignore[attr-defined]  # once a process
    _seen = []
    yield _seen
    _seen = None


def test_nothing_that_a_client_writes_makes_the_server_connect(connections: list[Any]):
    """CVE-2026-33626, CVE-2026-0599: no URL of a request is ever fetched."""
    asyncio.run(_write_urls_everywhere())  # asyncio's own loop: uvloop connects without Python's audit events
    assert connections, "the hook sees nothing"
    assert not [seen for seen in connections if "127.0.0.1" not in str(seen)]


async def _write_urls_everywhere() -> None:
    url = "http://198.51.100.7/x"
    part = {"type": "image_url", "image_url": {"url": url}}
    async with serving() as served:
        for content in (
            url,
            [part],
            [{"type": "text", "text": url}, part],
            [{"type": "input_audio", "input_audio": {"data": url}}],
        ):
            await ask(
                served,
                "POST",
                "/v1/chat/completions",
                {},
                {"model": "fake", "max_tokens": 1, "messages": [{"role": "user", "content": content}]},
            )
        for field in ("prompt", "model", "user", "suffix"):
            await ask(served, "POST", "/v1/completions", {}, {"model": "fake", "prompt": "a", "max_tokens": 1, field: url})


def test_the_server_has_no_client_to_fetch_with():
    """The same, by the sources: nothing that answers requests imports anything that makes them."""
    for folder in ("server", "text", "protocol", "engine", "core"):
        for path in (ROOT / "streamkv" / folder).rglob("*.py"):
            source = path.read_text()
            assert not re.search(r"ClientSession|urllib\.request|http\.client|^import requests|httpx|urlopen", source), path


# -- tenants -----------------------------------------------------------------------------------------------------------


async def test_a_tenants_name_is_the_salt_of_its_cache_whatever_it_asks_for(tmp_path: Path):
    """CVE-2025-46570: equal prompts of two tenants share nothing, on every door."""
    async with keyed(tmp_path) as served:
        body = {"model": "fake", "prompt": "the same for both", "max_tokens": 1}
        for tenant in ("acme", "rival"):
            assert (await ask(served, "POST", "/v1/completions", bearer(tenant), body)).status == 200
            async with served.raw(headers=bearer(tenant)) as raw:
                await raw.create("s", "the same for both", max_tokens=1)
                await raw.ended("s")
            for salt in ("acme", "rival", "", "\0acme"):
                await ask(served, "POST", "/v1/completions", bearer(tenant), body | {"cache_salt": salt})
        assert {request.salt.partition("\0")[0] for request in served.engine.requests} == {"acme", "rival"}
        salts: dict[str, set[str]] = {"acme": set(), "rival": set()}
        half = len(served.engine.requests) // 2
        for index, request in enumerate(served.engine.requests):
            salts["acme" if index < half else "rival"].add(request.salt)
        assert "" not in salts["acme"] | salts["rival"]
        assert not salts["acme"] & salts["rival"]


async def test_the_engine_is_told_whose_each_request_is_and_how_long_it_may_wait(tmp_path: Path):
    """Turns and shares are taken by what the key says, on every door; a salt of the client's own changes nothing."""
    async with keyed(tmp_path, queue_timeout_s=60.0) as served:
        body = {"model": "fake", "max_tokens": 1, "cache_salt": "rival"}
        chat = {"messages": [{"role": "user", "content": "a"}]}
        for path, given in (("completions", {"prompt": "a"}), ("chat/completions", chat), ("embeddings", {"input": "a"})):
            assert (await ask(served, "POST", f"/v1/{path}", bearer("acme"), body | given)).status == 200
        async with served.raw(headers=bearer("acme")) as raw:
            await raw.create("s", "a", max_tokens=1, cache_salt="rival")
            await raw.ended("s")
        assert len(served.engine.requests) == 4
        assert {(request.tenant, request.queue_timeout_s) for request in served.engine.requests} == {("acme", 60.0)}


async def test_another_tenants_session_is_as_if_it_were_not_there(tmp_path: Path):
    """Ids belong to a tenant: a stolen session id is of no use with another key."""
    async with keyed(tmp_path) as served, served.raw(headers=bearer("acme")) as mine:
        session, epoch = mine.welcome["session"], mine.welcome["epoch"]
        socket = await served.http.ws_connect(served.url, protocols=["streamkv.v1.json"], headers=bearer("rival"))
        raw = Raw(socket, text=True)
        await raw.send(t="hello", session=session, epoch=epoch)
        welcome = await raw.receive()
        assert welcome["session"] != session
        assert welcome.get("resumed") in (None, False)
        assert await mine.synced() == []  # nobody has taken it over
        await socket.close()
    assert KEYS  # three of them, of three tenants

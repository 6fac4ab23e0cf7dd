"""Who may connect, how connections end, what slow readers cost, and how the server goes away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outbox import Outbox
from streamkv.server.connection import Connection
from tests.server.serving import Raw, Serving, eventually, serving


async def upgrade_status(served: Serving, **options: Any) -> int:
    """HTTP status of an attempt to open a WebSocket; 101 if it opens."""
    options.setdefault("protocols", ["streamkv.v1.json"])
    try:
        async with served.http.ws_connect(served.url, **options):
            return 101
    except aiohttp.WSServerHandshakeError as error:
        return error.status


async def get(served: Serving, path: str) -> tuple[int, Any]:
    async with served.http.get(served.base + path) as response:
        return response.status, await response.json()


# -- who may connect ---------------------------------------------------------------------------------------------------


async def test_health_and_ready():
    async with serving() as served:
        assert await get(served, "/health") == (200, {"status": "ok"})
        assert await get(served, "/ready") == (200, {"status": "ready", "model": "fake"})


async def test_a_lost_engine_ends_streams_with_a_retryable_error_and_is_not_ready():
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 2
        await raw.create("s", "abc", max_tokens=10)
        await raw.wait_for_type("delta", "s")
        await served.engine._batches.put(None)
        error = await raw.wait_for_type("error", "s")
        assert (error["code"], error["retryable"]) == ("engine_lost", True)
        assert await get(served, "/ready") == (503, {"status": "engine_lost"})
        assert (await get(served, "/health"))[0] == 200


async def test_plain_http_is_told_that_this_is_a_websocket():
    async with serving() as served, served.http.get(served.base + "/v1/stream") as response:
        assert response.status == 426
        assert response.headers["Upgrade"] == "websocket"


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        (["streamkv.v2.json"], None),
        (["graphql-transport-ws", "STREAMKV.V1.JSON"], None),
        (["streamkv.v1.json"], "streamkv.v1.json"),
        (["streamkv.v9.json", "streamkv.v1.msgpack"], "streamkv.v1.msgpack"),
        (["streamkv.ticket.c2VjcmV0", "streamkv.v1.json"], "streamkv.v1.json"),
    ],
)
async def test_one_known_subprotocol_is_chosen_or_the_upgrade_refused(offered: list[str], chosen: str | None):
    async with serving() as served:
        if chosen is None:
            assert await upgrade_status(served, protocols=offered) == 400
        else:
            async with served.http.ws_connect(served.url, protocols=offered) as opened:
                assert opened.protocol == chosen
        await eventually(lambda: not served.server.stream_door.connections)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 101),
        ({"Origin": "http://{self}"}, 101),
        ({"Origin": "https://good.example"}, 101),
        ({"Origin": "https://good.example:444"}, 403),
        ({"Origin": "http://good.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "https://good.example.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://[::"}, 403),
        ({"Host": "localhost:1"}, 101),
        ({"Host": "127.0.0.1"}, 101),
        ({"Host": "[::1]:80"}, 101),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "[::"}, 403),
        ({"Host": "evil.example/?"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 403),
    ],
    ids=str,
)
async def test_pages_of_other_sites_are_refused(headers: dict[str, str], status: int):
    async with serving(allowed_origins=frozenset({"https://good.example"})) as served:
        own = f"127.0.0.1:{served.server.port}"
        sent = {name: value.format(self=own) if "{" in value else value for name, value in headers.items()}
        assert await upgrade_status(served, headers=sent) == status


async def test_named_hosts_are_the_only_ones():
    async with serving(allowed_hosts=frozenset({"streams.example"})) as served:
        assert await upgrade_status(served, headers={"Host": "streams.example:8000"}) == 101
        assert await upgrade_status(served, headers={"Host": "localhost"}) == 403


async def test_connections_beyond_the_limit_are_refused_until_one_ends():
    async with serving(max_connections=2) as served:
        async with served.raw(), served.raw():
            assert await upgrade_status(served) == 503
            assert (await get(served, "/ready"))[0] == 200
        await eventually(lambda: not served.server.stream_door.connections)
        assert await upgrade_status(served) == 101


async def test_connections_that_come_at_once_do_not_pass_the_limit_together():
    async with serving(max_connections=3) as served:
        statuses = await asyncio.gather(*(_held_upgrade(served) for _ in range(12)))
        assert sorted(status for status, _ in statuses) == [101] * 3 + [503] * 9
        for _, opened in statuses:
            if opened is not None:
                await opened.close()


async def _held_upgrade(served: Serving) -> tuple[int, aiohttp.ClientWebSocketResponse | None]:
    try:
        return 101, await served.http.ws_connect(served.url, protocols=["streamkv.v1.json"])
    except aiohttp.WSServerHandshakeError as error:
        return error.status, None


async def test_who_does_not_say_hello_in_time_is_closed():
    async with serving(limits=SessionLimits(hello_s=0.02)) as served, served.raw() as polite:
        async with served.raw(hello=False) as raw:
            closed = await raw.closed()
            assert (closed.code, "hello_timeout" in closed.reason) == (4408, True)
        assert await polite.synced() == []


# -- slow readers ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def deaf(served: Serving) -> AsyncIterator[tuple[Raw, Connection]]:
    """A client with a small receive buffer, and the server's side of it. It reads until `stop_reading`."""

    def small(address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return made

    known = set(served.server.stream_door.connections)
    connector = aiohttp.TCPConnector(socket_factory=small)
    async with aiohttp.ClientSession(connector=connector) as http, replace(served, http=http).raw() as raw:
        (connection,) = served.server.stream_door.connections - known
        transport = connection._request.transport
        assert transport is not None
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield raw, connection
        raw.socket._writer.transport.abort()


def stop_reading(raw: Raw) -> None:
    raw.socket._writer.transport.pause_reading()


async def fill(raw: Raw, connection: Connection) -> None:
    """Ask, and take no answer, until the server's writer waits for this client."""

    async def ask() -> None:
        while True:
            # The answer is four times as long as the question: after a while the kernel stops taking a deaf client's frames, too.
            await raw.send(t="cancel", id="")
            await asyncio.sleep(0)

    asking = asyncio.create_task(ask())
    await eventually(lambda: connection.aborted or connection._request.protocol._drain_waiter is not None)
    asking.cancel()
    await asyncio.wait({asking})


async def test_who_never_reads_is_aborted_when_a_send_takes_too_long():
    async with serving(send_timeout_s=0.5) as served, served.raw() as other:
        served.engine.hold = 3
        await other.create("o", "abc", max_tokens=6)
        async with deaf(served) as (raw, connection):
            await raw.create("s", "abc", max_tokens=100)
            await raw.wait_for_type("delta", "s")
            stop_reading(raw)
            await fill(raw, connection)
            await eventually(lambda: len(served.server.stream_door.connections) == 1)
        await eventually(lambda: served.engine.live == ["c1-0.0"])
        await served.engine.release()
        assert (await other.ended("o")).text == "abcabc"


async def test_who_is_behind_by_too_much_text_is_aborted_at_once(monkeypatch: pytest.MonkeyPatch):
    limits = SessionLimits(outbound=2048, control=8)
    async with serving(limits=limits, send_timeout_s=600.0, context=100_000) as served, served.raw() as other:
        served.engine.hold = 1
        await other.create("o", "abc", max_tokens=6)
        async with deaf(served) as (raw, connection):
            served.engine.hold = 3
            await raw.create("s", "abc", max_tokens=50_000)
            await raw.wait_for_type("delta", "s")
            stop_reading(raw)
            await fill(raw, connection)
            worst, look = 0, Outbox.text

            def watched(*arguments: Any) -> None:
                nonlocal worst
                look(*arguments)
                worst = max(worst, connection.live.session._outbox.bytes)

            monkeypatch.setattr(Outbox, "text", watched)
            await served.engine.release()
            await eventually(lambda: len(served.server.stream_door.connections) == 1)
            assert 2048 < worst < 2048 + 64
        await served.quiet()
        assert (await other.ended("o")).text == "abcabc"


# -- going away --------------------------------------------------------------------------------------------------------


async def test_drain_tells_lets_streams_finish_and_refuses_new_ones():
    async with (
        serving(drain_timeout_s=50.0) as served,
        served.raw() as raw,
        served.raw() as idle,
        served.raw(hello=False) as mute,
    ):
        served.engine.hold = 2
        await raw.create("s", "abc", max_tokens=9)
        await raw.wait_for_type("delta", "s")
        draining = asyncio.create_task(served.server.drain("a test"))
        notice = await raw.wait_for_type("drain")
        assert notice == {"t": "drain", "deadline_ms": 50_000, "reason": "a test"}
        assert (await mute.closed()).code == 1001
        assert await get(served, "/ready") == (503, {"status": "draining"})
        assert (await get(served, "/health"))[0] == 200
        assert await upgrade_status(served) == 503
        await raw.create(["x", "y"], "abc")
        for name in ("x", "y"):
            refusal = await raw.wait_for_type("error", name)
            assert (refusal["code"], refusal["retryable"]) == ("draining", True)
        assert not draining.done()
        await served.engine.release()
        assert (await raw.wait_for_type("done", "s"))["o"] == 9
        for client in (raw, idle):
            assert (await client.closed()).code == 1001
        assert await draining is True


async def test_drain_ends_what_does_not_finish_in_time():
    async with serving(drain_timeout_s=0.05) as served, served.raw() as raw:
        served.engine.hold = 2
        await raw.create("s", "abc", max_tokens=9)
        await raw.wait_for_type("delta", "s")
        assert await served.server.drain("a test") is False
        assert (await raw.closed()).code == 1001
        await served.quiet()


async def test_drain_without_connections_ends_at_once():
    async with serving(drain_timeout_s=500.0) as served:
        assert await served.server.drain("a test") is True


async def test_drain_does_not_wait_for_a_peer_that_never_reads():
    async with serving(drain_timeout_s=0.05, send_timeout_s=0.1) as served, deaf(served) as (raw, connection):
        await raw.create("s", "abc", max_tokens=100)
        await raw.wait_for_type("delta", "s")
        stop_reading(raw)
        await fill(raw, connection)
        await served.server.drain("a test")
        await eventually(lambda: not served.server.stream_door.connections)
        await served.quiet()

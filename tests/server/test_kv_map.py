"""The map of KV blocks: who sees what of whom, snapshot and changes, and viewers that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.engine.api import KVMap, KVOwner
from streamkv.server.kv_map import LIVE_PROTOCOL, KVDoor
from streamkv.server.kv_view import Viewer
from tests.server.serving import DEADLINE_S, Serving, eventually, serving
from tests.server.wire import bearer, keyed, keys_text

SALTS = ("acme", "acme\0own", "rival", "acmes")


def kv_map(blocks: list[tuple[int, int]], requests: int = 3, at: float = 100.0) -> KVMap:
    """Blocks as (state, owner); every other column is told from these."""
    states, owners = (np.array([block[index] for block in blocks], dtype) for index, dtype in ((0, "u1"), (1, "<i4")))
    return KVMap(
        at,
        7,
        16,
        states.tobytes(),
        owners.tobytes(),
        (owners >= 0).astype("<u2").tobytes(),
        np.where(states > 0, 5 + np.maximum(owners, 0), 0).astype("<u2").tobytes(),
        np.where(states == 1, at - 3, np.nan).tobytes(),
        tuple(KVOwner(f"r{index}", SALTS[index], 40 + index, 4) for index in range(requests)),
        SALTS,
    )


BLOCKS = st.lists(
    st.sampled_from([(0, -1), (3, -1), *((1, -2 - index) for index in range(4)), *((2, index) for index in range(3))]), min_size=1
)


def expanded(message: dict[str, Any], blocks: list[list[int]] | None = None) -> list[list[int]]:
    """The columns of every block, after a message."""
    table = blocks if blocks is not None else [[] for _ in range(message["blocks"])]
    for first, count, *columns in message["runs"]:
        for block in range(first, first + count):
            table[block] = columns
    return table


@given(BLOCKS, st.sampled_from([None, "acme", "rival", "nobody"]))
def test_a_tenant_sees_its_own_and_of_others_only_that_they_are_there(blocks: list[tuple[int, int]], tenant: str | None):
    message = Viewer(tenant).snapshot(kv_map(blocks))
    table = expanded(message)
    ids = {request["n"]: request.get("id") for request in message["requests"]}
    assert "acme" not in {request.get("tenant") for request in message["requests"]} or tenant is None
    own_salts = {None: SALTS, "acme": SALTS[:2], "rival": SALTS[2:3], "nobody": ()}[tenant]
    for (state, owner), (shown, number, refs, filled, since) in zip(blocks, table, strict=True):
        assert shown == state
        salt = SALTS[owner] if owner >= 0 else SALTS[-2 - owner] if owner < -1 else None
        own = salt in own_salts
        if state == 2:
            assert ids[number] == (f"r{owner}" if own else None)
        else:
            assert number == (-1 if own else 0)
        assert (refs >= 0) == (filled >= 0) == own
        assert since == (97_000 if own and state == 1 else -1)
    text = msgspec.json.encode(message).decode()
    for index, salt in enumerate(SALTS[:3]):
        if salt not in own_salts:
            assert f'"r{index}"' not in text, "another tenant's id"
            assert f'"prompt":{40 + index}' not in text, "how much another tenant has asked"


@given(st.lists(BLOCKS.map(lambda blocks: (blocks * 12)[:12]), min_size=2, max_size=5), st.sampled_from([None, "acme"]))
def test_a_snapshot_and_its_deltas_are_the_next_snapshot(maps: list[list[tuple[int, int]]], tenant: str | None):
    viewer = Viewer(tenant)
    table = expanded(viewer.snapshot(kv_map(maps[0])))
    for blocks in maps[1:]:
        delta = viewer.delta(kv_map(blocks))
        for first, count, *_ in delta["runs"]:
            assert all(before != after for before, after in zip(table[first : first + count], [*range(count)], strict=True))
        expanded(delta, table)
    whole = Viewer(tenant)
    assert table == expanded(whole.snapshot(kv_map(maps[-1])))
    assert viewer.delta(kv_map(maps[-1]))["runs"] == [], "nothing has changed"


def test_numbers_of_requests_are_not_given_twice():
    viewer = Viewer("acme")
    first = viewer.snapshot(kv_map([(2, 0)], requests=1))["requests"][0]["n"]
    viewer.delta(kv_map([(0, -1)], requests=0))
    assert viewer.delta(kv_map([(2, 0)], requests=1))["requests"][0]["n"] > first


def test_a_hundred_thousand_blocks_are_a_few_runs():
    blocks = [(2, index // 1000 % 3) for index in range(50_000)] + [(1, -2)] * 30_000 + [(0, -1)] * 20_000
    message = Viewer("acme").snapshot(kv_map(blocks))
    assert len(message["runs"]) == 52
    assert len(msgspec.json.encode(message)) < 4096


# -- over the wire ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(served: Serving, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    url = f"ws://127.0.0.1:{served.server.port}/v1/kv/live"
    async with served.http.ws_connect(url, protocols=[LIVE_PROTOCOL], **options) as socket:
        yield socket


async def next_of(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        return msgspec.json.decode((await socket.receive()).data)


def door_of(served: Serving) -> KVDoor:
    (door,) = (door for door in served.server.doors if isinstance(door, KVDoor))
    return door


async def snapshot(served: Serving, **headers: str) -> dict[str, Any]:
    door_of(served)._look_again_at = 0.0  # a moment has passed
    async with served.http.get(f"{served.base}/v1/kv/map", headers=headers) as answer:
        assert answer.status == 200
        return msgspec.json.decode(await answer.read())


async def test_two_tenants_see_their_own_requests_only(tmp_path: Path):
    async with keyed(tmp_path) as served:
        served.engine.hold = 1
        async with served.raw(headers=bearer("acme")) as acme, served.raw(headers=bearer("rival")) as rival:
            for raw in (acme, rival):
                await raw.create("s", "a question of " + ("acme" if raw is acme else "rival"), max_tokens=5)
                await raw.wait_for(lambda message: message.get("state") == "stalled")
            ids = [request.ids[0] for request in served.engine.requests]
            seen = {name: await snapshot(served, **bearer(name)) for name in ("acme", "rival", "boss")}
            async with watching(served, headers=bearer("acme")) as socket:
                live = await next_of(socket)
    for name, own, other in (("acme", *ids), ("rival", *reversed(ids))):
        text = msgspec.json.encode(seen[name]).decode()
        assert own in text
        assert other not in text
        assert "load" not in seen[name], "the whole server's figures tell what others do"
        assert seen[name]["counts"]["used"] == 2
    assert {request["tenant"] for request in seen["boss"]["requests"]} == {"acme", "rival"}
    assert seen["boss"]["load"]["running"] == 2
    assert [request.get("id") for request in live["requests"]] == [ids[0], None]


@pytest.mark.parametrize("path", ["/v1/kv/map", "/v1/kv/live"])
async def test_nobody_looks_without_a_key(tmp_path: Path, path: str):
    async with keyed(tmp_path) as served:
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "YQ=="}
        async with served.http.get(served.base + path, headers=upgrade if path.endswith("live") else {}) as answer:
            assert answer.status == 401


async def test_a_live_map_is_a_snapshot_and_then_what_changes():
    async with serving() as served, served.raw() as raw, watching(served) as socket:
        first = await next_of(socket)
        assert (first["t"], first["blocks"], first["runs"]) == ("snapshot", 1024, [[0, 1024, 0, 0, 0, 0, -1]]) or first["runs"]
        table = expanded(first)
        served.engine.hold = 1
        await raw.create("s", "abc", max_tokens=3)
        while not (message := await next_of(socket))["runs"]:
            assert message["t"] == "delta"
        expanded(message, table)
        assert table[0][:2] == [2, message["requests"][0]["n"]]
        assert message["requests"][0]["stalled"] or message["requests"][0]["output"] == 1
        await raw.send(t="cancel", id="s")
        while not (message := await next_of(socket))["runs"]:
            pass
        expanded(message, table)
        assert all(columns[0] == 0 for columns in table)


async def test_all_viewers_share_one_look_and_looking_is_rare():
    async with serving() as served:
        async with watching(served) as one, watching(served) as two:
            await next_of(one)
            await next_of(two)
        assert served.engine.looks == 1


async def test_viewers_are_few_speak_the_protocol_and_say_nothing():
    async with serving() as served:
        door = door_of(served)
        door._max_viewers = 1
        async with watching(served) as socket:
            await next_of(socket)
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with watching(served):
                    pass
            assert refused.value.status == 503
            await socket.send_str("hello")
            async with asyncio.timeout(DEADLINE_S):
                while (frame := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                    pass
            assert frame.data == 1003
        await eventually(lambda: door.closed)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with served.http.ws_connect(f"ws://127.0.0.1:{served.server.port}/v1/kv/live"):
                pass
        assert refused.value.status == 400
        async with served.http.get(f"{served.base}/v1/kv/live") as answer:
            assert answer.status == 426


async def test_a_viewer_that_does_not_read_is_cut_off_and_holds_nothing():
    async with serving(send_timeout_s=0.05) as served:
        door = door_of(served)
        door._interval_s = 0.0
        blocks = [(index % 2 * 2, 0 if index % 2 else -1) for index in range(100_000)]
        served.engine.kv_map = lambda: asyncio.sleep(0, kv_map(blocks, requests=1))  # type: ignore[method-assign]  # a large one
        viewers = door._sockets
        # Changes all the time, so that every message is large.
        flips = iter(range(10**9))
        original = Viewer.delta
        try:
            Viewer.delta = lambda self, kv, load=None: self.snapshot(kv, {"flip": next(flips)})  # type: ignore[method-assign]  # as above
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port, limit=1024)
            writer.write(
                b"GET /v1/kv/live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                b"Sec-WebSocket-Protocol: " + LIVE_PROTOCOL.encode() + b"\r\n\r\n"
            )
            assert b"101" in await reader.readline()
            reader._transport.pause_reading()  # type: ignore[attr-defined]  # as a suspended browser tab does
            await eventually(lambda: bool(viewers))
            await eventually(lambda: not viewers)
            writer.close()
        finally:
            Viewer.delta = original  # type: ignore[method-assign]  # as it was
        assert served.server.recorder.metrics.slow.values[()] == 1


async def test_who_has_lost_his_key_sees_no_more(tmp_path: Path):
    async with keyed(tmp_path) as served, watching(served, headers=bearer("acme")) as socket:
        await next_of(socket)
        (tmp_path / "keys.toml").write_text(keys_text(["rival"]))
        await served.server.guard.reload_keys(even_if_unchanged=True)
        async with asyncio.timeout(DEADLINE_S):
            while (frame := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        assert (frame.data, frame.extra) == (4401, "unauthorized: this API key has been revoked")


async def test_a_server_that_goes_away_says_so():
    async with serving() as served, watching(served) as socket:
        await next_of(socket)
        await served.server.drain("maintenance")
        async with asyncio.timeout(DEADLINE_S):
            while (frame := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        assert (frame.data, frame.extra) == (1001, "going_away: maintenance")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with watching(served):
                pass
        assert refused.value.status == 503

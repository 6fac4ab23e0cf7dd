"""`streamkv.client` over connections that break: every token once, credit by consumption, forks, and an end if there is none."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamkv.client import ClientConnectionError, RemoteError, connect
from tests.server.serving import DEADLINE_S, Serving, eventually, serving

CODECS = ["json", "msgpack"]


@pytest.fixture(autouse=True)
async def nothing_hangs() -> AsyncIterator[None]:
    async with asyncio.timeout(DEADLINE_S):
        yield


async def cut(served: Serving) -> None:
    """Break every connection, as a pulled cable does."""
    for connection in tuple(served.server.stream_door.connections):
        connection.abort("test")
    await asyncio.sleep(0)


@pytest.mark.parametrize("codec", CODECS)
async def test_streams_survive_connections_that_break_at_any_moment(codec: Any):
    chance = random.Random(7)
    async with serving(grace_s=30.0) as served, connect(served.url, codec=codec, window=32) as client:
        streams = [client.complete(f"stream {index} ", max_tokens=200) for index in range(20)]
        reading = asyncio.gather(*(stream.result() for stream in streams))
        kills = 0
        while not reading.done():
            await eventually(lambda: reading.done() or any(c.live for c in served.server.stream_door.connections))
            for _ in range(chance.randrange(40)):
                await asyncio.sleep(0)
            await cut(served)
            kills += 1
        texts = await reading
        assert texts == [(f"stream {index} " * 30)[:200] for index in range(20)]
        assert all(stream.num_tokens == 200 and stream.done is not None for stream in streams)
        assert kills > 3
        assert sum(stream.resumes for stream in streams) > 0
        await served.quiet()


async def test_a_reader_that_does_not_read_gets_its_window_and_no_more():
    async with serving() as served, connect(served.url, window=16) as client:
        lazy, eager = client.complete("abc", max_tokens=100), client.complete("xyz", max_tokens=100)
        assert len(await eager.result()) == 100
        await eventually(lambda: lazy.num_tokens == 16)
        assert lazy.state == "stalled"
        assert len(await lazy.result()) == 100


async def test_no_window_means_no_limit():
    async with serving() as served, connect(served.url, window=None) as client:
        stream = client.complete("abc", max_tokens=100)
        await eventually(lambda: stream.done is not None)
        assert stream.num_tokens == 100


async def test_what_was_asked_for_while_there_was_no_connection_is_asked_for_again():
    async with serving(grace_s=30.0) as served, connect(served.url) as client:
        await cut(served)
        stream = client.complete("abc", max_tokens=6)
        assert await stream.result() == "abcabc"
        assert len(served.engine.requests) == 1


async def test_a_cancel_is_not_lost_with_the_connection():
    async with serving(grace_s=30.0) as served, connect(served.url) as client:
        served.engine.hold = 3
        stream = client.complete("abc", max_tokens=100)
        await eventually(lambda: stream.num_tokens == 3)
        await cut(served)
        await stream.cancel()
        await eventually(lambda: stream.done is not None)
        assert stream.done is not None
        assert stream.done.finish_reason == "cancelled"
        await served.quiet()


async def test_a_stream_that_ended_while_nobody_was_there_still_ends():
    async with serving(grace_s=30.0) as served, connect(served.url, reconnect_s=30.0) as client:
        served.engine.hold = 2
        stream = client.complete("abc", max_tokens=9)
        await eventually(lambda: stream.num_tokens == 2)
        await cut(served)
        await served.engine.release()
        assert await stream.result() == "abcabcabc"


async def test_a_session_that_is_gone_ends_its_streams_and_takes_new_ones():
    async with serving(grace_s=0.0) as served, connect(served.url, reconnect_s=30.0) as client:
        served.engine.hold = 2
        stream = client.complete("abc", max_tokens=100)
        await eventually(lambda: stream.num_tokens == 2)
        await cut(served)
        with pytest.raises((ClientConnectionError, RemoteError)):
            await stream.result()
        assert stream.text == "ab"
        served.engine.hold = None
        assert await client.complete("abc", max_tokens=4).result() == "abca"


async def test_forks_go_on_from_what_was_read():
    def reply(request: Any, branch: int, position: int) -> int:
        return ord("a") + (len(request.prompt) + position) % 26 if not branch else ord("A") + branch

    async with serving(reply=reply) as served, connect(served.url) as client:
        parent = client.complete("xyz", max_tokens=10)
        text = await parent.result()
        assert text == "defghijklm"
        one, two = parent.fork(2, at=4, max_tokens=3)
        assert [await one.result(), await two.result()] == ["BBB", "CCC"]
        assert (one.base, one.num_tokens) == (4, 7)
        (added,) = parent.fork(prompt="!!", max_tokens=2)
        await added.result()
        assert served.engine.requests[-1].prompt == [*b"xyz", *text.encode(), *b"!!"]
        with pytest.raises(RemoteError, match="no token left"):
            await parent.fork()[0].result()


async def test_a_fork_of_a_running_stream_leaves_it_alone():
    async with serving() as served, connect(served.url) as client:
        served.engine.hold = 5
        parent = client.complete("abc", max_tokens=12)
        await eventually(lambda: parent.num_tokens == 5)
        (fork,) = parent.fork(max_tokens=2)
        served.engine.hold = None
        assert len(await fork.result()) == 2
        assert fork.base == 5
        await served.engine.release()
        assert await parent.result() == "abcabcabcabc"


async def test_a_client_that_is_told_not_to_come_back_does_not():
    async with serving(grace_s=30.0) as served, connect(served.url) as client:
        stream = client.complete("abc" * 20, max_tokens=100, priority=0)
        (connection,) = served.server.stream_door.connections
        connection.close(4409, "taken_over: test")
        with pytest.raises(ClientConnectionError, match="4409"):
            await stream.result()

"""A client that goes away takes its work with it, wherever that is: checked on real sockets, down to the empty engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.server.openai.dialect import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, bare, door, door_of, post
from tests.server.serving import CountingTokenizer, Serving, eventually

LONG = {"prompt": "abc", "max_tokens": 90_000}


@asynccontextmanager
async def slow_tokenizer(tokenizer: CountingTokenizer) -> AsyncIterator[threading.Event]:
    """Tokenising waits inside the block; the event is set when somebody does."""
    begun, go = threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slow(text: str) -> list[int]:
        begun.set()
        assert go.wait(60)
        return encode(text)

    tokenizer.encode = slow  # type: ignore[method-assign]  # to stop time
    try:
        yield begun
    finally:
        go.set()


async def gone(served: Serving) -> None:
    """Nothing of the request is left, and the server still serves."""
    await eventually(lambda: door_of(served).closed)
    await served.quiet()
    assert (await post(served, COMPLETIONS, {"prompt": "ok", "max_tokens": 2}))[1]["choices"][0]["text"] == "ok"


@pytest.mark.parametrize("streamed", [False, True])
async def test_while_it_is_tokenised(streamed: bool):
    async with door(context=100_000) as served:
        async with slow_tokenizer(served.tokenizer) as begun, bare(served, COMPLETIONS, LONG | {"stream": streamed}):
            await eventually(begun.is_set)
        await gone(served)
        assert len(served.engine.requests) == 1, "the request of a client that is gone was submitted"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("phase", ["taking", "answering"])
async def test_while_it_is_submitted(streamed: bool, phase: str):
    async with door(context=100_000) as served:
        wire = getattr(served.engine, phase)
        wire.clear()
        async with bare(served, COMPLETIONS, LONG | {"stream": streamed, "n": 3}):
            await eventually(lambda: bool(served.engine.requests) and (phase == "taking" or len(served.engine.live) == 3))
        await asyncio.sleep(0)
        wire.set()
        await gone(served)


@pytest.mark.parametrize("streamed", [False, True])
async def test_while_it_waits_or_computes_its_prompt(streamed: bool):
    async with door(context=100_000) as served:
        served.engine.hold = 0
        async with bare(served, CHAT, {"messages": HELLO, "n": 2, "stream": streamed}):
            await eventually(lambda: len(served.engine.live) == 2)
        await eventually(lambda: not served.engine.live)
        served.engine.hold = None
        await gone(served)


@pytest.mark.parametrize("streamed", [False, True])
async def test_while_it_generates(streamed: bool):
    async with door(context=100_000) as served:
        served.engine.hold = 5
        async with bare(served, COMPLETIONS, LONG | {"stream": streamed}) as (reader, _):
            if streamed:
                assert b'"text":"b"' in await reader.readuntil(b'"text":"b"')
            await eventually(lambda: [live.num_tokens for live in served.engine._live.values()] == [5])
        await eventually(lambda: not served.engine.live)
        served.engine.hold = None
        await gone(served)


async def test_while_its_events_are_written():
    async with door(context=100_000) as served:
        async with bare(served, COMPLETIONS, LONG | {"stream": True}) as (reader, _):
            await reader.readuntil(b'"text":"c"')
        await gone(served)


async def test_who_closes_its_half_only_is_gone_too():
    async with door(context=100_000) as served:
        async with bare(served, COMPLETIONS, LONG | {"stream": True}) as (reader, writer):
            await reader.readuntil(b'"text":"c"')
            writer.write_eof()
            await eventually(lambda: not served.engine.live)
        await gone(served)


async def test_while_its_inputs_become_vectors():
    async with door() as served:
        served.engine.taking.clear()
        async with bare(served, EMBEDDINGS, {"input": ["x"] * 50}):
            await eventually(lambda: len(served.engine.requests) == 8)
        await asyncio.sleep(0)
        served.engine.taking.set()
        await gone(served)
        assert len(served.engine.requests) == 9, "inputs of a client that is gone were submitted"


async def test_a_thread_that_tokenises_for_nobody_keeps_its_turn():
    async with door(context=100_000) as served:
        async with slow_tokenizer(served.tokenizer) as begun:
            async with bare(served, "/tokenize", {"prompt": "abc"}):
                await eventually(begun.is_set)
            await eventually(lambda: not door_of(served)._active)
            assert not door_of(served).closed
            begun.clear()
            async with bare(served, "/tokenize", {"prompt": "abc"}):
                await eventually(lambda: door_of(served)._active == 1)
                assert not begun.is_set(), "two threads at once"
        await gone(served)


async def test_a_storm_of_clients_that_leave_at_any_moment():
    async with door(context=100_000) as served:

        async def come_and_go(number: int) -> None:
            body: dict[str, Any] = LONG | {"stream": number % 3 > 0, "n": 1 + number % 2}
            async with bare(served, COMPLETIONS, body) as (reader, _):
                for _ in range(number % 17):
                    await asyncio.sleep(0)
                if number % 5 == 4 and body["stream"]:
                    await reader.readuntil(b"data")

        for start in range(0, 200, 40):
            await asyncio.gather(*(come_and_go(number) for number in range(start, start + 40)))
        await gone(served)

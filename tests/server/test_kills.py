"""A hundred dead connections under forty streams: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.server.serving import Raw, serving
from tests.server.test_resume import CODECS, reference, reply


class Reader:
    """The least that a client must remember of its streams to resume them."""

    def __init__(self, names: list[str], window: int) -> None:
        self.window = window
        self.text = dict.fromkeys(names, "")
        self.count = dict.fromkeys(names, 0)
        self.granted = dict.fromkeys(names, window)
        self.ends: dict[str, dict[str, Any]] = {}

    @property
    def open(self) -> list[str]:
        return [name for name in self.text if name not in self.ends]

    async def read(self, raw: Raw) -> bool:
        """One message; True if it was text."""
        message = await raw.receive()
        name = message.get("id")
        assert message["t"] != "error", message
        if message["t"] == "delta":
            assert message["o"] == self.count[name], "a token is missing or came twice"
            self.text[name] += message["x"]
            self.count[name] += message["n"]
            assert self.count[name] <= self.granted[name]
            if self.granted[name] - self.count[name] <= self.window // 2:
                self.granted[name] = self.count[name] + self.window
                await raw.send(t="credit", id=name, max=self.granted[name], ack=self.count[name])
        elif message["t"] == "done":
            assert name not in self.ends
            self.ends[name] = message
        return message["t"] == "delta"


async def until_killed(reader: Reader, raw: Raw, deltas: int) -> None:
    """Read so many deltas, or to the end of all streams; then die."""
    while deltas and reader.open:
        deltas -= await reader.read(raw)
    raw.kill()


@pytest.mark.parametrize("seed", range(2))
async def test_a_hundred_dead_connections_lose_nothing(seed: int):
    streams, tokens, kills = 40, 400, 100
    rng = random.Random(seed)
    names = [f"s{number}" for number in range(streams)]
    reader = Reader(names, window=48)
    async with serving(reply=reply, context=600, grace_s=60.0) as served:
        async with served.raw() as raw:
            welcome = raw.welcome
            for number, name in enumerate(names):
                await raw.create(name, [number], max_tokens=tokens, create_max=48)
            await until_killed(reader, raw, 3)
        for number in range(kills):
            async with served.again(welcome, CODECS[number % 2]) as raw:
                assert raw.welcome["resumed"]
                for name in reader.open:
                    await raw.resume(name, reader.count[name], max=reader.granted[name])
                assert reader.open, "everything is over too early; the test should be longer"
                await until_killed(reader, raw, 10**9 if number == kills - 1 else rng.randrange(12))
        assert reader.text == {name: reference(number, tokens) for number, name in enumerate(names)}
        assert {end["usage"]["completion"] for end in reader.ends.values()} == {tokens}
        await served.quiet()

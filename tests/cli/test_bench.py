"""`streamkv bench` against a real server over a fake engine: what it counts is what was sent."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamkv.cli import bench, main
from streamkv.engine.api import EngineRequest
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.protocol.session import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer
from tests.cli.conftest import byte_tokenizer

DEADLINE_S = 60.0


class Remembering(FakeEngine):
    """Keeps every request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(info=fake_info(vocab_size=300, max_model_len=512), **options)
        self.requests: list[EngineRequest] = []
        self.arrived = asyncio.Event()

    async def submit(self, request: EngineRequest) -> None:
        await super().submit(request)
        self.requests.append(request)
        self.arrived.set()


@asynccontextmanager
async def served(engine: FakeEngine, **limits: Any) -> AsyncIterator[tuple[Server, str]]:
    """A listening server and its URL."""
    engine.start()
    try:
        async with TextStreams(engine, TextTokenizer(byte_tokenizer(300))) as streams:
            server = Server(streams, ServerConfig(port=0, drain_timeout_s=0.0, limits=SessionLimits(**limits)))
            async with server.listening():
                yield server, f"ws://127.0.0.1:{server.port}/v1/stream"
    finally:
        await engine.close()


async def command(url: str, *options: str) -> int:
    """The command in a thread of its own, as its process would run it."""
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.to_thread(main, ["bench", "--url", url, *options])


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in:\n{text}"
    return float(match[1].replace(",", ""))


@pytest.mark.smoke
async def test_every_token_of_every_stream_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering()
    async with served(engine, streams=4) as (_, url):
        options = ["--streams", "10", "--prompt-tokens", "7", "--output-tokens", "20", "--seed", "3"]
        assert await command(url, *options) == 0
        printed = capsys.readouterr().out
        assert [len(request.prompt) for request in engine.requests] == [7] * 10
        assert {request.sampling.max_tokens for request in engine.requests} == {20}
        first = sorted(request.prompt for request in engine.requests)
        assert len({tuple(prompt) for prompt in first}) == 10
        engine.requests.clear()
        assert await command(url, *options) == 0
        assert sorted(request.prompt for request in engine.requests) == first, "the same seed gives the same prompts"
    assert "10 streams on 3 connections, all at once" in printed
    assert number(r"([\d,]+) output tokens in", printed) == 200
    assert number(r"of ([\d,]+) prompt tokens", printed) == 70
    assert "errors: 0" in printed


async def test_times_are_those_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    interval = 0.05
    async with served(Remembering(interval_s=interval)) as (_, url):
        assert await command(url, "--streams", "1", "--output-tokens", "12", "--rate", "5") == 0
    printed = capsys.readouterr().out
    # A token every 50 ms; a server cannot be faster, and whole streams add up whatever the machine does meanwhile.
    assert number(r"whole stream +([\d.]+)", printed) >= 11 * interval * 1000 * 0.9
    assert number(r"between tokens +([\d.]+)", printed) >= interval * 1000 * 0.5
    assert number(r"time to first token +([\d.]+)", printed) > 0


async def test_streams_that_are_refused_are_counted_as_errors(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(Remembering()) as (_, url):
        assert await command(url, "--streams", "3", "--prompt-tokens", "500", "--output-tokens", "100") == 1
    printed = capsys.readouterr().out
    assert "errors: 3" in printed
    assert "  3 x context_length_exceeded: " in printed


async def test_a_server_that_goes_away_is_an_error_of_every_stream(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering(interval_s=3600.0)
    async with served(engine) as (server, url):
        running = asyncio.create_task(command(url, "--streams", "2", "--output-tokens", "9"))
        async with asyncio.timeout(DEADLINE_S):
            while len(engine.requests) < 2:
                await engine.arrived.wait()
                engine.arrived.clear()
            await server.drain("test")
    assert await running == 1
    assert number(r"errors: (\d+)", capsys.readouterr().out) == 2


def test_without_a_server_one_sentence_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "ws://127.0.0.1:9/v1/stream"]) == 1
    assert capsys.readouterr().err == ("streamkv: no server at ws://127.0.0.1:9/v1/stream: start one with `streamkv serve`\n")


@pytest.mark.parametrize("options", [["--streams", "0"], ["--rate", "0"], ["--rate", "nan"], ["--prompt-tokens", "x"]])
def test_wrong_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["bench", *options])
    assert wrong.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100)])
def test_percentiles_of_one_to_a_hundred(share: float, expected: float) -> None:
    values: list[float] = list(range(1, 101))
    random.Random(0).shuffle(values)
    percentile: Callable[..., float] = bench._percentile
    assert percentile(values, share) == expected


def test_arrivals_are_poisson_with_the_given_rate_and_start_at_once() -> None:
    times = bench._arrivals(random.Random(1), 10_000, 50.0)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert math.isclose(times[-1], 10_000 / 50, rel_tol=0.05)
    assert bench._arrivals(random.Random(1), 3, math.inf) == [0.0, 0.0, 0.0]

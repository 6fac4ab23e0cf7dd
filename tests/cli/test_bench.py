"""`streamkv bench serve` against a real server over a fake engine: what it counts is what was sent, through both doors."""

from __future__ import annotations

import asyncio
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamkv.bench.trace import TraceRequest, read_trace, write_trace
from streamkv.cli import main
from streamkv.engine.api import EngineRequest
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import TextTokenizer
from tests.cli.conftest import byte_tokenizer

DEADLINE_S = 60.0
DOORS = ["native", "sse"]


class Remembering(FakeEngine):
    """Keeps every request, and what was cancelled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(info=fake_info(vocab_size=300, max_model_len=512), **options)
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.most = 0
        self.arrived = asyncio.Event()

    async def submit(self, request: EngineRequest) -> None:
        await super().submit(request)
        self.requests.append(request)
        self.most = max(self.most, len(self._live))
        self.arrived.set()

    async def cancel(self, request_id: str, *reason: Any) -> None:
        self.cancelled += [request_id] * (request_id in self._live)
        await super().cancel(request_id, *reason)


@asynccontextmanager
async def served(engine: FakeEngine, *, limits: SessionLimits | None = None, **config: Any) -> AsyncIterator[tuple[Server, str]]:
    """A listening server and its URL."""
    engine.start()
    try:
        async with TextStreams(engine, TextTokenizer(byte_tokenizer(300))) as streams:
            server = Server(streams, ServerConfig(port=0, drain_timeout_s=0.0, limits=limits or SessionLimits(), **config))
            async with server.listening():
                yield server, f"http://127.0.0.1:{server.port}"
    finally:
        await engine.close()


async def command(url: str, *options: str) -> int:
    """The command in a thread of its own, as its process would run it."""
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.to_thread(main, ["bench", "serve", url, *options])


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in:\n{text}"
    return float(match[1].replace(",", ""))


@pytest.mark.parametrize("door", DOORS)
async def test_every_token_of_every_stream_is_counted(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering()
    async with served(engine, limits=SessionLimits(streams=4)) as (_, url):
        options = ["--requests", "10", "--prompt-tokens", "7", "--output-tokens", "20", "--seed", "3", "--door", door]
        assert await command(url, *options) == 0
        printed = capsys.readouterr().out
        assert [len(request.prompt) for request in engine.requests] == [7] * 10
        assert {request.sampling.max_tokens for request in engine.requests} == {20}
        assert len({tuple(request.prompt) for request in engine.requests}) == 10
        assert "200 output tokens" in printed
        assert "0 of 70 prompt tokens from the prefix cache" in printed
        assert "completed: 10, cancelled: 0, errors: 0" in printed
        first = sorted(request.prompt for request in engine.requests)
        assert await command(url, *options) == 0
        assert sorted(request.prompt for request in engine.requests[10:]) == first


@pytest.mark.parametrize("door", DOORS)
async def test_times_are_those_of_the_engine(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    interval = 0.02
    async with served(Remembering(interval_s=interval)) as (_, url):
        assert await command(url, "--requests", "3", "--output-tokens", "12", "--door", door) == 0
    printed = capsys.readouterr().out
    assert number(r"whole stream +([\d.]+)", printed) >= 11 * interval * 1000 * 0.9
    assert number(r"between tokens +([\d.]+)", printed) >= interval * 1000 * 0.5
    assert number(r"time to first token +([\d.]+)", printed) > 0


@pytest.mark.parametrize("door", DOORS)
async def test_a_closed_loop_keeps_so_many_under_way(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering(interval_s=0.001)
    async with served(engine) as (_, url):
        assert await command(url, "--requests", "12", "--output-tokens", "20", "--concurrency", "3", "--door", door) == 0
    assert len(engine.requests) == 12
    assert engine.most == 3
    assert "3 at once" in capsys.readouterr().out


@pytest.mark.parametrize("door", DOORS)
async def test_a_share_is_given_up_and_counted_apart(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering(interval_s=0.002)
    async with served(engine) as (_, url):
        options = ["--requests", "10", "--output-tokens", "100", "--cancel", "1", "--seed", "1", "--door", door]
        assert await command(url, *options) == 0
        assert "completed: 0, cancelled: 10, errors: 0" in capsys.readouterr().out
        async with asyncio.timeout(DEADLINE_S):
            while (await engine.stats()).running:
                await asyncio.sleep(0.001)
    assert len(engine.cancelled) == 10


async def test_a_trace_is_replayed_with_its_lengths_and_shared_blocks(tmp_path: Path) -> None:
    trace = [TraceRequest(0, 600, 40, (1, 2)), TraceRequest(10, 1024, 20, (1, 3)), TraceRequest(20, 512, 4, (9,))]
    write_trace(tmp_path / "in.jsonl", trace)
    engine = Remembering()
    async with served(engine) as (_, url):
        options = ["--trace", str(tmp_path / "in.jsonl"), "--scale", "4", "--write-trace", str(tmp_path / "out.jsonl")]
        assert await command(url, *options) == 0
    assert read_trace(tmp_path / "out.jsonl") == trace
    asked = sorted(engine.requests, key=lambda request: -request.sampling.max_tokens)
    assert [(len(request.prompt), request.sampling.max_tokens) for request in asked] == [(150, 10), (256, 5), (128, 1)]
    assert asked[0].prompt[:128] == asked[1].prompt[:128]
    assert asked[0].prompt[128:] != asked[1].prompt[128:150]


async def test_an_open_loop_comes_at_the_wanted_rate_and_writes_its_figures(tmp_path: Path) -> None:
    engine = Remembering()
    async with served(engine) as (_, url):
        files = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.svg")]
        options = ["--profile", "chat", "--scale", "128", "--requests", "40", "--rate", "80", "--seed", "2", "--slo-ttft", "5"]
        assert await command(url, *options, *files) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["requests"] == figures["completed"] == figures["good"] == 40
    assert 39 / 80 * 0.9 < figures["seconds"] < DEADLINE_S
    assert (figures["door"], figures["traffic"], figures["seed"]) == ("native", "chat", 2)
    assert figures["slo"] == {"ttft": 5.0, "itl": None}
    assert figures["ttft"]["p50"] <= figures["ttft"]["p99"] <= figures["e2e"]["max"]
    assert figures["output_tokens"] == sum(request.sampling.max_tokens for request in engine.requests)
    assert ET.parse(tmp_path / "f.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("door", DOORS)
async def test_streams_that_are_refused_are_counted_as_errors(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with served(Remembering()) as (_, url):
        options = ["--requests", "3", "--prompt-tokens", "500", "--output-tokens", "100", "--door", door]
        assert await command(url, *options) == 1
    printed = capsys.readouterr().out
    assert "errors: 3" in printed
    assert "  3 x context_length_exceeded: " in printed


@pytest.mark.parametrize("door", DOORS)
async def test_a_server_that_goes_away_is_an_error_of_every_stream(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Remembering(interval_s=3600.0)
    async with served(engine) as (server, url):
        running = asyncio.create_task(command(url, "--requests", "2", "--output-tokens", "9", "--door", door))
        async with asyncio.timeout(DEADLINE_S):
            while len(engine.requests) < 2:
                await engine.arrived.wait()
                engine.arrived.clear()
            await server.drain("test")
    assert await running == 1
    assert number(r"errors: (\d+)", capsys.readouterr().out) == 2


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key = "sk-streamkv-" + "k" * 32
    async with served(Remembering(), api_key=key) as (_, url):
        for door in DOORS:
            monkeypatch.delenv("STREAMKV_API_KEY", raising=False)
            assert await command(url, "--requests", "1", "--door", door) == 1
            assert "401" in capsys.readouterr().err  # HTTP's 401, or the close code 4401
            monkeypatch.setenv("STREAMKV_API_KEY", key)
            assert await command(url, "--requests", "1", "--output-tokens", "2", "--door", door) == 0


@pytest.mark.parametrize("door", DOORS)
def test_without_a_server_one_sentence_says_so(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "http://127.0.0.1:9", "--door", door]) == 1
    error = capsys.readouterr().err
    assert error.startswith("streamkv: no server at ")
    assert error.endswith(": start one with `streamkv serve`\n")


@pytest.mark.parametrize(
    "options",
    [
        ["--requests", "0"],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--prompt-tokens", "x"],
        ["--cancel", "1.5"],
        ["--scale", "3"],
        ["--scale", "256"],
        ["--slo-ttft", "-1"],
        ["--concurrency", "2", "--rate", "3"],
    ],
)
def test_wrong_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["bench", "serve", *options])
    assert wrong.value.code == 2
    assert options[-2] in capsys.readouterr().err


def test_a_url_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "ftp://here"]) == 1
    assert "is no URL of a server" in capsys.readouterr().err

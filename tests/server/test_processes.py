"""`streamkv serve` as a process of its own, with a tiny model: starts, answers, drains at SIGTERM."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamkv.client import Client, ClientConnectionError, RemoteError, connect
from tests.runner.tiny import save_tiny
from tests.server.serving import DEADLINE_S, TEMPLATE, byte_tokenizer

CONTEXT = 512


@dataclass
class Served:
    """A running `streamkv serve`."""

    process: subprocess.Popen[str]
    url: str

    def ready(self) -> dict[str, str]:
        address = self.url.replace("ws://", "http://").replace("/v1/stream", "/ready")
        with urllib.request.urlopen(address, timeout=DEADLINE_S) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def serve(model: Path, *options: str) -> Iterator[Served]:
    """Wait for the line that says where it listens; killed at the end if it still runs."""
    command = [sys.executable, "-m", "streamkv", "serve", str(model), "--port", "0", "--num-blocks", "128", *options]
    process = subprocess.Popen(
        [*command, "--served-model-name", "tiny"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"ws://127\.0\.0\.1:\d+/v1/stream", line)
        assert found, f"not ready: {line!r}"
        yield Served(process, found[0])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


async def talk(client: Client) -> None:
    """What a stranger tries first."""
    assert client.welcome is not None
    assert client.welcome.models == ["tiny"]
    streams = [client.complete(f"number {index}", max_tokens=20, temperature=0) for index in range(4)]
    texts = [await stream.result() for stream in streams]
    again = client.complete("number 2", max_tokens=20, temperature=0)
    assert await again.result() == texts[2]
    answers = client.samples(3, [{"role": "user", "content": "hi"}], max_tokens=8, seed=3, logprobs=True, top_logprobs=2)
    assert len({await answer.result() for answer in answers}) > 1
    assert all(answer.num_tokens == 8 for answer in answers)
    with pytest.raises(RemoteError) as caught:
        await client.complete("x" * CONTEXT).result()
    assert (caught.value.remote_code, caught.value.param) == ("context_length_exceeded", "body.prompt")
    long = client.complete("cancel me", max_tokens=CONTEXT - 9)
    async for _ in long:
        await long.cancel()
    assert long.done is not None
    assert long.done.finish_reason in ("cancelled", "length")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_it_serves_and_lets_a_running_stream_finish_at_sigterm(model: Path, loop: str):
    async def session(served: Served) -> None:
        async with asyncio.timeout(DEADLINE_S), connect(served.url) as client:
            await talk(client)
            stream = client.complete("to the end", max_tokens=300, temperature=0)
            deltas = aiter(stream)
            await anext(deltas)
            served.process.send_signal(signal.SIGTERM)
            async for _ in deltas:
                pass
            assert stream.done is not None
            assert (stream.done.finish_reason, stream.num_tokens) == ("length", 300)

    with serve(model, "--loop", loop) as served:
        assert served.ready() == {"status": "ready", "model": "tiny"}
        asyncio.run(session(served))
        assert served.process.wait(DEADLINE_S) == 0


def test_a_stream_that_outlasts_the_drain_is_cut_and_the_exit_status_says_so(model: Path):
    async def session(served: Served) -> None:
        async with asyncio.timeout(DEADLINE_S), connect(served.url) as client:
            # Eight at once, so that the end is still far away when the signal comes.
            streams = [client.complete([index] * 8, max_tokens=CONTEXT - 8) for index in range(8)]
            await anext(aiter(streams[0]))
            served.process.send_signal(signal.SIGTERM)
            with pytest.raises(ClientConnectionError, match="1001"):
                await asyncio.gather(*(stream.result() for stream in streams))

    with serve(model, "--drain-timeout", "0") as served:
        asyncio.run(session(served))
        assert served.process.wait(DEADLINE_S) == 1

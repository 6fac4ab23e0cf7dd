"""Sockets that are cut at random bytes, under streams that must not notice.

python -m benchmarks.resume [--kills 100] [--streams 40] [--connections 8] [--tokens 2000] [--seed 1] [--quick]

Clients talk to the server through a proxy that resets one of their connections again and again. At the end every stream's text
is compared with what the engine has said: a lost, doubled or swapped token is an error, and so is a stream that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from contextlib import AsyncExitStack

import uvloop

from benchmarks.report import print_setting, print_table
from benchmarks.timed import VOCAB, Proxy, served, word_of
from streamkv.client import Client, connect
from streamkv.client.stream import Stream
from streamkv.engine.api import EngineRequest
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.logs import configure_logs
from streamkv.sampling_params import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description="cut sockets under streams")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--connections", type=int, default=8, help="that share the streams (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream, 200 a second (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="5 cuts under 6 streams: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.streams, arguments.connections, arguments.tokens = 5, 6, 2, 200
    print_setting("streamkv", "aiohttp", "uvloop")
    configure_logs(level="error")
    uvloop.run(_measure(arguments))


async def _measure(arguments: argparse.Namespace) -> None:
    engine = FakeEngine(word_of, info=fake_info(vocab_size=VOCAB, max_model_len=100_000), interval_s=0.005)
    engine.start()
    source = random.Random(arguments.seed)
    async with served(engine) as server, AsyncExitStack() as stack:
        proxy = Proxy(server.port)
        await stack.enter_async_context(proxy.running())
        url = f"ws://127.0.0.1:{proxy.port}/v1/stream"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(arguments.connections)]
        began = time.monotonic()
        streams = [_ask(clients[index % len(clients)], index, arguments.tokens) for index in range(arguments.streams)]
        reading = asyncio.gather(*(stream.result() for stream in streams), return_exceptions=True)
        kills = await _cut(proxy, reading, arguments, source)
        texts = await asyncio.wait_for(reading, 120)
        seconds = time.monotonic() - began
    await engine.close()
    _report(arguments, streams, texts, kills, seconds)


def _ask(client: Client, index: int, tokens: int) -> Stream:
    return client.complete([300 + index], max_tokens=tokens, temperature=0, ignore_eos=True)


async def _cut(proxy: Proxy, reading: asyncio.Future[list[object]], arguments: argparse.Namespace, source: random.Random) -> int:
    """Cut as evenly as chance allows over the time that the streams take."""
    mean, kills = arguments.tokens * 0.005 * 0.9 / arguments.kills, 0
    while kills < arguments.kills and not reading.done():
        await asyncio.sleep(source.expovariate(1 / mean))
        kills += proxy.cut(source)
    return kills


def _report(arguments: argparse.Namespace, streams: list[Stream], texts: list[object], kills: int, seconds: float) -> None:
    wrong, failed = [], []
    for index, (stream, text) in enumerate(zip(streams, texts, strict=True)):
        request = EngineRequest(("x",), [300 + index], Sampling(max_tokens=arguments.tokens))
        expected = "".join(f" w{word_of(request, 0, position) - 256}" for position in range(arguments.tokens))
        if isinstance(text, BaseException):
            failed.append(f"{stream.id}: {text!r}")
        elif str(text).lstrip() != expected.lstrip() or stream.num_tokens != arguments.tokens:
            wrong.append(stream.id)
    resumes = sum(stream.resumes for stream in streams)
    header = ["", "streams", "tokens", "sockets cut", "resumes of streams", "lost or doubled tokens", "failed streams", "seconds"]
    row = ["run", len(streams), f"{len(streams) * arguments.tokens:,}", kills, resumes, len(wrong), len(failed), f"{seconds:.1f}"]
    print_table("Sockets cut at random bytes", header, [row])
    for failure in failed:
        print(failure)
    if wrong or failed or kills < arguments.kills:
        raise SystemExit(f"wrong: {wrong}, failed: {len(failed)}, cut: {kills} of {arguments.kills}")


if __name__ == "__main__":
    main()

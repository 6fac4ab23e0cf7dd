"""The async `Engine`: streams that grow, readers that are slow or leave early, and errors where they belong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from streamkv import Engine, SamplingParams
from streamkv.engine.config import EngineConfig
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.errors import DrainingError, EngineError, InvalidRequestError
from streamkv.text.streams import TextStreams
from tests.llm.conftest import SETTINGS
from tests.runner.tiny import generate
from tests.text.kinds import text_tokenizer

DEADLINE_S = 60.0
PROMPT = [10, 20, 30, 40]


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[Engine]:
    async with Engine(EngineConfig(model=str(folder), **SETTINGS)) as running:
        yield running


async def quiet(engine: Engine) -> None:
    """Wait until nothing runs any more."""
    async with asyncio.timeout(DEADLINE_S):
        while engine.streams.num_open:
            await asyncio.sleep(0)
    stats = await engine.streams.client.stats()
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.smoke
async def test_each_yield_is_the_same_output_grown(engine: Engine, folder: Path) -> None:
    lengths: list[int] = []
    texts = [""]
    async for output in engine.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0)):
        (sample,) = output.outputs
        lengths.append(len(sample.token_ids))
        assert sample.text.startswith(texts[-1])
        texts.append(sample.text)
    assert output.finished
    assert lengths == sorted(lengths)
    assert len(lengths) > 1, "it streams"
    assert sample.token_ids == generate(folder, PROMPT, 12)
    assert sample.text == text_tokenizer("byte_level").decode(sample.token_ids)


async def test_many_at_once_are_the_same_as_one_by_one(engine: Engine) -> None:
    async def last(prompt: list[int]) -> list[int]:
        outputs = [output async for output in engine.generate(prompt, SamplingParams(max_tokens=8, temperature=0.0))]
        return outputs[-1].outputs[0].token_ids

    prompts = [[10 + index, 5, 6] for index in range(8)]
    alone = [await last(prompt) for prompt in prompts]
    assert await asyncio.gather(*map(last, prompts)) == alone
    await quiet(engine)


async def test_a_slow_reader_gets_everything_when_it_comes_back(engine: Engine) -> None:
    """Events pile up while it is away: with several samples, all of them must be taken over at once."""
    stream = engine.generate(PROMPT, SamplingParams(n=3, max_tokens=20, seed=1))
    first = await anext(stream)
    await quiet(engine)
    assert not first.finished
    rest = [output async for output in stream]
    assert len(rest) == 1, "one yield brings all that has come meanwhile"
    assert rest[0] is first
    assert [len(sample.token_ids) for sample in first.outputs] == [20, 20, 20]
    assert first.finished


@pytest.mark.parametrize("how", ["break", "close", "cancel"])
async def test_leaving_early_cancels_the_request(engine: Engine, how: str) -> None:
    params = SamplingParams(max_tokens=250, n=2)
    if how == "break":
        async for _ in engine.generate(PROMPT, params):
            break
    elif how == "close":
        stream = engine.generate(PROMPT, params)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
    else:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate(PROMPT, params):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await quiet(engine)
    assert (await engine.streams.client.stats()).output_tokens < 500


async def test_chat_and_errors(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    outputs = [output async for output in engine.chat(messages, SamplingParams(max_tokens=2))]
    assert outputs[-1].prompt_token_ids == text_tokenizer("byte_level").encode_chat(messages)
    with pytest.raises(InvalidRequestError, match="token id"):
        async for _ in engine.generate([-5]):
            pass
    with pytest.raises(InvalidRequestError, match="empty"):
        async for _ in engine.generate(""):
            pass
    await quiet(engine)


async def test_outside_of_its_block_it_says_so(folder: Path) -> None:
    engine = Engine(EngineConfig(model=str(folder), **SETTINGS))
    with pytest.raises(EngineError, match="async with"):
        await anext(engine.generate(PROMPT))
    async with engine:
        pass
    with pytest.raises(EngineError, match="async with"):
        await anext(engine.generate(PROMPT))


# -- an engine that fails: a fake one in its place --------------------------------------------------------------------


async def over(engine: FakeEngine, use: Any) -> None:
    """Run `use` with an `Engine` over this engine."""
    engine.start()
    async with TextStreams(engine, text_tokenizer("byte_level")) as streams:
        facade = Engine()
        facade._streams = streams
        await use(facade)
    await engine.close()


async def test_an_engine_that_is_lost_raises_in_every_reader() -> None:
    fake = FakeEngine(info=fake_info(max_model_len=10**6))

    async def use(facade: Engine) -> None:
        async def read() -> None:
            async for _ in facade.generate(PROMPT, SamplingParams(max_tokens=10**5)):
                started.release()

        started = asyncio.Semaphore(0)
        readers = [asyncio.create_task(read()) for _ in range(3)]
        for _ in range(3):
            await started.acquire()
        await facade.streams.__aexit__(None, None, None)
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "engine stopped" in str(result)
        with pytest.raises(DrainingError):
            await anext(facade.generate(PROMPT))

    await over(fake, use)


async def test_a_request_that_is_cancelled_from_elsewhere_ends_its_reader() -> None:
    fake = FakeEngine()

    async def use(facade: Engine) -> None:
        stream = facade.generate(PROMPT, SamplingParams(max_tokens=4000))
        output = await anext(stream)
        await fake.drain(0.0)
        assert [later is output async for later in stream][-1]
        assert output.outputs[0].finish_reason == "cancelled"
        assert output.finished

    await over(fake, use)

"""Prompt log-probabilities, echo, embeddings and scores over the wire, from a real model and from the fake."""

from __future__ import annotations

from typing import Any

import pytest

from streamkv import Engine
from streamkv.client import RemoteError, connect
from streamkv.engine.fake import fake_info
from tests.server.serving import CONTEXT, VOCAB, HeldEngine, serving

CODECS = ["json", "msgpack"]
TEXT = "the quick brown fox jumps over the lazy dog"


def url_of(address: str) -> str:
    return f"ws://{address}/v1/stream"


@pytest.mark.parametrize("codec", CODECS)
async def test_embeddings_and_scores_are_those_of_the_python_api(real: tuple[str, Engine], codec: Any):
    address, engine = real
    texts = [
        TEXT,
        "Blocks are shared",
        "日本語のテキスト, and more",
        *(f"number {n}" for n in range(20)),
    ]  # more than one frame takes
    async with connect(url_of(address), codec=codec) as client:
        vectors = await client.embed(texts, pooling="mean")
        scores = await client.score(texts)
        choices = await client.score([" fox", " dog"], prompt="the quick brown")
        beside = client.complete(TEXT, max_tokens=5)
        (alone,) = await client.embed([[1, 2, 3]])
        assert await beside.result()
    for text, vector, score in zip(texts, vectors, scores, strict=True):
        assert vector == pytest.approx((await engine.embed(text, pooling="mean", normalize=False)).embedding, abs=1e-5)
        expected = await engine.score(text)
        assert (score.logprob, score.perplexity) == pytest.approx((expected.logprob, expected.perplexity), rel=1e-5)
        assert score.tokens == len(expected.token_ids)
    expected = [(await engine.score(text, context="the quick brown")).logprob for text in (" fox", " dog")]
    assert [choice.logprob for choice in choices] == pytest.approx(expected, rel=1e-5)
    assert len(alone) == 128


@pytest.mark.parametrize("codec", CODECS)
async def test_echo_and_prompt_logprobs(real: tuple[str, Engine], codec: Any):
    address, engine = real
    async with connect(url_of(address), codec=codec) as client:
        plain = client.complete(TEXT, max_tokens=8, temperature=0)
        echoed = client.complete(TEXT, max_tokens=8, temperature=0, echo=True, logprobs=2)
        scored = client.complete(TEXT, max_tokens=0, prompt_logprobs=0)
        for stream in (plain, echoed, scored):
            await stream.result()
    assert echoed.text == TEXT + plain.text
    assert echoed.num_tokens == plain.num_tokens == 8
    expected = (await engine.score(TEXT)).logprobs
    for stream, top in ((echoed, 2), (scored, 0)):
        assert [entry["chosen"] for entry in stream.prompt_logprobs] == pytest.approx([e.chosen for e in expected], rel=1e-4)
        assert [entry["rank"] for entry in stream.prompt_logprobs] == [entry.rank for entry in expected]
        assert all(len(entry["top"]) == top for entry in stream.prompt_logprobs)
    assert plain.prompt_logprobs == []
    assert scored.done is not None
    assert (scored.text, scored.done.finish_reason, scored.done.usage.completion) == ("", "length", 0)


async def test_frames_of_the_prompt_are_small_and_come_before_text():
    async with serving() as fake, fake.raw() as socket:
        await socket.create("s", "x" * 200, max_tokens=2, prompt_logprobs=0)
        seen = []
        while not seen or seen[-1]["t"] != "done":
            seen.append(await socket.receive())
        frames = [message for message in seen if message["t"] == "prompt"]
        assert [(frame["o"], len(frame["lp"])) for frame in frames] == [(1, 64), (65, 64), (129, 64), (193, 7)]
        assert seen.index(frames[-1]) < next(index for index, message in enumerate(seen) if message["t"] == "delta")


async def test_more_log_probabilities_than_may_wait_are_refused():
    context = 4096
    async with serving(context=context) as served, connect(served.url) as client:
        fits, too_many = 32_768 // 21, 32_768 // 21 + 1
        assert await client.complete([1] * fits, max_tokens=1, prompt_logprobs=20).result()
        with pytest.raises(RemoteError, match="more than 32768 log-probabilities; ask for fewer") as refused:
            await client.complete([1] * too_many, max_tokens=1, prompt_logprobs=20).result()
        assert refused.value.param == "body.prompt_logprobs"
        assert await client.score([[1] * (context - 1)]), "a score reports no single tokens"


async def test_inputs_that_cannot_be_read_end_their_own_stream_only(real: tuple[str, Engine]):
    address, _ = real
    async with connect(url_of(address)) as client:
        good, bad = client._create("score", {"input": [TEXT, [5]]}, 2, {})
        assert await good.result() == ""
        with pytest.raises(RemoteError, match="no token that could be scored"):
            await bad.result()
        assert good.done is not None
        assert good.done.score is not None


async def test_a_model_without_hidden_states_says_so():
    engine = HeldEngine(info=fake_info(vocab_size=VOCAB, max_model_len=CONTEXT))
    async with serving(engine=engine) as served, connect(served.url) as client:
        with pytest.raises(RemoteError, match="gives no embeddings"):
            await client.embed("abc")


async def test_an_echo_of_a_whole_context_does_not_make_a_client_slow():
    """It is what the client sent itself; only further text counts against a reader that is behind."""
    context = 300_000
    async with serving(context=context) as served, served.raw() as socket:
        await socket.create("s", "x" * (context - 10), max_tokens=2, echo=True)
        ended = await socket.ended("s")
        assert len(ended.text) == context - 10 + 2

"""What is left: tokenising, tools, tenants' salts, priority, prompt log-probabilities, a real model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import aiohttp
import openai
import pytest

from streamkv import Engine, SamplingParams
from streamkv.server.openai.chat import ChatAnswer
from streamkv.server.principal import Principal
from tests.server.openai.dialect import CHAT, COMPLETIONS, HELLO, door, known, post
from tests.server.serving import eventually

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


async def test_tokenizing_and_back():
    async with door() as served:
        _, made, _ = await post(served, "/tokenize", {"prompt": "hé", "return_token_strs": True})
        assert made == {"count": 3, "max_model_len": 256, "tokens": [104, 195, 169], "token_strs": ["h", "\ufffd", "\ufffd"]}
        _, back, _ = await post(served, "/detokenize", {"tokens": made["tokens"]})
        assert back == {"prompt": "hé"}
        _, chat, _ = await post(served, "/tokenize", {"messages": HELLO, "model": "fake"})
        assert (chat["count"], chat["token_strs"]) == (8, None)
        assert (await post(served, "/detokenize", {"tokens": chat["tokens"]}))[1]["prompt"] == "<|user|>hello<|end|><|assistant|>"
        assert (await post(served, "/detokenize", {"tokens": []}))[1] == {"prompt": ""}
        _, whole, _ = await post(served, CHAT, {"messages": HELLO, "max_tokens": 1})
        assert whole["usage"]["prompt_tokens"] == chat["count"]


async def test_tools_need_a_template_that_has_a_place_for_them():
    async with door() as served:
        status, refusal, _ = await post(served, CHAT, {"messages": HELLO, "max_tokens": 1, "tools": TOOLS})
        assert (status, refusal["error"]["param"]) == (400, "tools")
        body = {"messages": HELLO, "max_tokens": 1, "tools": TOOLS, "tool_choice": "none"}
        assert (await post(served, CHAT, body))[0] == 200, "none leaves them out"


async def test_prompt_log_probabilities_have_the_form_of_vllm():
    async with door() as served:
        _, whole, _ = await post(served, COMPLETIONS, {"prompt": "ab!", "max_tokens": 1, "prompt_logprobs": 1})
        first, second, third = whole["choices"][0]["prompt_logprobs"]
        assert first is None
        assert second == {"98": {"logprob": known(98, 1).chosen, "rank": 1, "decoded_token": "b"}}
        assert third["33"] == {"logprob": -9999.0, "rank": 1 + 33 % 7, "decoded_token": "!"}
        _, chat, _ = await post(served, CHAT, {"messages": HELLO, "max_tokens": 1, "prompt_logprobs": 0, "n": 2})
        assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
        _, plain, _ = await post(served, CHAT, {"messages": HELLO, "max_tokens": 1})
        assert "prompt_logprobs" not in plain


async def test_priority_and_salt_reach_the_engine():
    async with door(api_key="sk-0123456789abcdef") as served:
        body = {"prompt": "abc", "max_tokens": 1, "priority": -3}
        assert (await post(served, COMPLETIONS, body))[0] == 401
        key = {"Authorization": "Bearer sk-0123456789abcdef"}
        for salt in ({}, {"cache_salt": "mine"}):
            assert (await post(served, COMPLETIONS, body | salt, **key))[0] == 200
        first, second = served.engine.requests
        assert (first.priority, first.salt, second.salt) == (-3, "default", "default\0mine")


def test_no_salt_reads_as_another_tenants():
    tenants, salts = ["", "a", "ab"], [None, "a", "b", "ab", "a\0b"]
    pairs = [(tenant, salt) for tenant in tenants for salt in salts]
    assert len({Principal(tenant).salt_with(salt) for tenant, salt in pairs}) == len(pairs)


# -- a real model ------------------------------------------------------------------------------------------------------


async def test_a_real_model_says_the_same_streamed_whole_and_in_process(real: tuple[str, Engine]):
    address, engine = real
    texts = ["the quick brown fox", "日本語のテキスト", "Blocks are shared; "]
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        (model,) = (await client.models.list()).data

        async def compare(text: str, **body: Any) -> None:
            settings = {"max_tokens": 24, "temperature": 0.8, "seed": 7, "logprobs": 2} | body
            whole = await client.completions.create(model=model.id, prompt=text, **settings)
            choice = whole.choices[0]
            streamed, logprobs = "", []
            async for chunk in await client.completions.create(model=model.id, prompt=text, stream=True, **settings):
                streamed += chunk.choices[0].text
                if chunk.choices[0].logprobs is not None:
                    logprobs += chunk.choices[0].logprobs.token_logprobs or []
            assert choice.logprobs is not None
            assert streamed == choice.text
            # Float sums differ a little with the batch that a step happened to have.
            pairs = zip(logprobs, choice.logprobs.token_logprobs or [], strict=True)
            assert all(ours == theirs or ours == pytest.approx(theirs, abs=1e-3) for ours, theirs in pairs)
            output = [output async for output in engine.generate(text, SamplingParams(**settings))][-1]
            assert output.outputs[0].text == choice.text
            echoed = len(output.prompt_token_ids) if body.get("echo") else 0
            assert len(logprobs) == echoed + len(output.outputs[0].token_ids)

        await asyncio.gather(*(compare(text) for text in texts), *(compare(text, echo=True) for text in texts))
        embedded = await client.embeddings.create(model=model.id, input=texts)
        for text, made in zip(texts, embedded.data, strict=True):
            assert made.embedding == pytest.approx((await engine.embed(text)).embedding, abs=1e-5)


async def test_a_salt_keeps_blocks_apart(real: tuple[str, Engine]):
    address, _ = real
    text = "the quick brown fox jumps over the lazy dog"
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:

        async def cached(**extra: Any) -> int:
            made = await client.completions.create(model=model, prompt=text, max_tokens=1, extra_body=extra)
            assert made.usage is not None
            assert made.usage.prompt_tokens_details is not None
            return made.usage.prompt_tokens_details.cached_tokens or 0

        model = (await client.models.list()).data[0].id
        assert await cached() == 0
        shared = await cached()
        assert shared > 0
        assert await cached(cache_salt="mine") == 0
        assert await cached(cache_salt="mine") == shared
        assert await cached(cache_salt="yours") == 0


async def test_a_real_engine_is_empty_after_its_clients_have_left(real: tuple[str, Engine]):
    address, engine = real
    body = {"messages": HELLO, "max_tokens": 200, "n": 3, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"http://{address}/v1/chat/completions", json=body | {"stream": True}) as response:
            while b"content" not in await response.content.readline():
                pass
            response.close()
        asking = asyncio.create_task(http.post(f"http://{address}/v1/chat/completions", json=body))
        await eventually(lambda: engine.streams.num_open == 3)
        asking.cancel()
        await asyncio.wait({asking})
    await eventually(lambda: engine.streams.num_open == 0)

    async def used() -> int:
        return (await engine.streams.client.stats()).blocks_used

    while await used():
        await asyncio.sleep(0.001)


# -- much at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "loop"), [(20, True), (200, False)])
async def test_thousands_of_log_probabilities_are_not_written_on_the_loop(
    monkeypatch: pytest.MonkeyPatch, tokens: int, loop: bool
):
    """Whoever asks for many makes nobody else wait."""
    threads = []
    whole = ChatAnswer.whole
    monkeypatch.setattr(
        ChatAnswer, "whole", lambda self, pieces: threads.append(threading.current_thread()) or whole(self, pieces)
    )
    async with door() as served:
        body = {"messages": HELLO, "max_tokens": tokens, "n": 4, "logprobs": True, "top_logprobs": 20}
        _, answer, _ = await post(served, CHAT, body)
    assert sum(len(choice["logprobs"]["content"]) for choice in answer["choices"]) == 4 * tokens
    assert (threads == [threading.main_thread()]) == loop


async def test_the_bound_of_what_is_said_of_prompts_counts_every_choice():
    async with door(context=4096) as served:
        body = {"prompt": [97] * 1000, "max_tokens": 1, "echo": True, "logprobs": 3, "n": 8}
        assert (await post(served, COMPLETIONS, body))[0] == 200
        status, refusal, _ = await post(served, COMPLETIONS, body | {"n": 9})
        assert (status, refusal["error"]["param"]) == (400, "prompt_logprobs")
        chat = {"messages": [{"role": "user", "content": "a" * 1000}], "max_tokens": 1, "prompt_logprobs": 3, "n": 16}
        assert (await post(served, CHAT, chat))[0] == 200, "a chat says it once"

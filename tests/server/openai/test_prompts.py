"""Several prompts in one completion, as langchain, litellm and evaluation harnesses send them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from streamkv import Engine
from tests.server.openai.dialect import COMPLETIONS, bare, door, post, sdk, stream
from tests.server.serving import eventually

TEXTS = [f"<{number}>" for number in range(20)]


def texts_of(chunks: list[dict[str, Any]], count: int) -> list[str]:
    """What a stream says for each choice; each ends once."""
    texts, ended = [""] * count, [0] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ended[choice["index"]] += choice["finish_reason"] is not None
    assert ended == [1] * count
    return texts


async def test_choices_are_in_the_order_of_the_prompts_and_then_of_the_samples():
    async with door(lambda request, branch, position: request.prompt[position] + branch) as served, sdk(served) as client:
        made = await client.completions.create(model="fake", prompt=["ab", "xy"], max_tokens=2, n=2)
        assert [(choice.index, choice.text) for choice in made.choices] == [(0, "ab"), (1, "bc"), (2, "xy"), (3, "yz")]
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (4, 8)
        ids = await client.completions.create(model="fake", prompt=[[97], [98], [99]], max_tokens=1)
        assert [choice.text for choice in ids.choices] == ["a", "b", "c"]


async def test_many_prompts_streamed_and_whole_a_few_at_a_time():
    async with door() as served:
        body = {"prompt": TEXTS, "max_tokens": 4}
        _, whole, _ = await post(served, COMPLETIONS, body)
        expected = [(text * 4)[:4] for text in TEXTS]
        assert [choice["text"] for choice in whole["choices"]] == expected
        assert whole["usage"]["prompt_tokens"] == sum(map(len, TEXTS))
        *chunks, last = await stream(served, COMPLETIONS, body | {"stream_options": {"include_usage": True}})
        assert texts_of(chunks, len(TEXTS)) == expected
        assert last["usage"] == whole["usage"]
        served.engine.hold = 0
        asking = asyncio.create_task(post(served, COMPLETIONS, body))
        await eventually(lambda: len(served.engine.live) == 8)
        await asyncio.sleep(0)
        assert len(served.engine.live) == 8
        served.engine.hold = None
        await served.engine.release()
        assert (await asking)[1]["choices"] == whole["choices"]


async def test_each_prompt_has_its_own_echo_and_log_probabilities():
    async with door() as served:
        body = {"prompt": ["ab", "xyz"], "max_tokens": 1, "echo": True, "logprobs": 0, "n": 2}
        _, whole, _ = await post(served, COMPLETIONS, body)
        for choice, text in zip(whole["choices"], ("aba", "aba", "xyzx", "xyzx"), strict=True):
            assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == text
            assert choice["logprobs"]["text_offset"] == list(range(len(text)))
            assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True] + [False] * (len(text) - 1)
        _, scored, _ = await post(served, COMPLETIONS, {"prompt": ["ab", "xyz"], "max_tokens": 1, "prompt_logprobs": 0})
        assert [[entry and list(entry) for entry in choice["prompt_logprobs"]] for choice in scored["choices"]] == [
            [None, ["98"]],
            [None, ["121"], ["122"]],
        ]
        status, refusal, _ = await post(served, COMPLETIONS, {"prompt": [[1] * 200] * 9, "max_tokens": 1, "prompt_logprobs": 20})
        assert (status, refusal["error"]["param"]) == (400, "prompt_logprobs"), "the bound is of all prompts together"


async def test_a_prompt_that_fails_fails_the_request_and_nothing_more_is_begun():
    async with door() as served:
        served.engine.fail_after = 2  # type: ignore[attr-defined]  # a KnowingEngine
        status, refusal, _ = await post(served, COMPLETIONS, {"prompt": TEXTS, "max_tokens": 4})
        assert (status, refusal["error"]["code"]) == (500, "numerical_error")
        assert len(served.engine.requests) == 8
        *_, error = await stream(served, COMPLETIONS, {"prompt": TEXTS, "max_tokens": 4})
        assert error["error"]["code"] == "numerical_error"
        await served.quiet()


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_the_engine_refuses_later_ends_the_request(streamed: bool):
    async with door() as served:
        submit = served.engine.submit

        async def broken(request: Any) -> None:
            if len(served.engine.requests) == 10:
                raise ZeroDivisionError("secret inside")
            await submit(request)

        served.engine.submit = broken  # type: ignore[method-assign]  # what nobody has foreseen
        body = {"prompt": TEXTS, "max_tokens": 4}
        if streamed:
            *_, answer = await stream(served, COMPLETIONS, body)
        else:
            status, answer, _ = await post(served, COMPLETIONS, body)
            assert status == 500
        assert answer["error"]["code"] == "internal"
        assert "secret" not in str(answer)


async def test_a_client_that_leaves_takes_its_waiting_prompts_with_it():
    async with door() as served:
        served.engine.hold = 1
        async with bare(served, COMPLETIONS, {"prompt": TEXTS, "max_tokens": 4, "stream": True}) as (reader, _):
            await reader.readuntil(b"data")
            await eventually(lambda: len(served.engine.live) == 8)
        await served.quiet()
        assert len(served.engine.requests) == 8


async def test_a_real_model_says_of_each_what_it_says_of_it_alone(real: tuple[str, Engine]):
    address, _ = real
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        settings: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0}
        texts = [f"{number} quick brown foxes" for number in range(12)]
        together = await client.completions.create(prompt=texts, **settings)
        for text, choice in zip(texts, together.choices, strict=True):
            assert choice.text == (await client.completions.create(prompt=text, **settings)).choices[0].text

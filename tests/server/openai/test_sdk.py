"""openai-python against the door: what its users do, and which of its exceptions they see."""

from __future__ import annotations

import array
import asyncio
import base64
from typing import Any

import openai
import pytest

from streamkv.errors import OverloadedError
from tests.server.openai.dialect import HELLO, door, sdk
from tests.server.serving import TEMPLATE

PROMPT = "<|user|>hello<|end|><|assistant|>"  # as the template writes it: three special tokens and five bytes


async def test_a_chat_whole_and_streamed():
    assert "{{ m.content }}" in TEMPLATE
    async with door() as served, sdk(served) as client:
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=7, seed=1)
        (choice,) = whole.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello", "length")
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (8, 7, 15)
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 0
        assert whole._request_id
        streamed = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=7, stream=True)
        chunks = [chunk async for chunk in streamed]
        assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
            (chunks[0].id, chunks[0].created, "fake", "chat.completion.chunk")
        }
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == "hello"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk.usage is None for chunk in chunks)
        assert deltas[-1].content is None, "the end is a chunk of its own"


async def test_a_stop_string_ends_an_answer_and_is_not_in_it():
    async with door() as served, sdk(served) as client:
        for stop, text in (("lo", "hel"), (["x", "l"], "he"), (None, "hello")):
            whole = await client.completions.create(model="fake", prompt="hello", max_tokens=5, stop=stop)
            assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "stop" if stop else "length")
            chunks = await client.completions.create(model="fake", prompt="hello", max_tokens=5, stop=stop, stream=True)
            assert [chunk.choices[0].finish_reason async for chunk in chunks][-1] == ("stop" if stop else "length")
        ended = await client.completions.create(model="fake", prompt="hello", extra_body={"stop_token_ids": [ord("l")]})
        assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("he", "stop")


async def test_samples_are_choices():
    async with door(lambda request, branch, position: ord("a") + branch) as served, sdk(served) as client:
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, n=3)
        assert [(choice.index, choice.message.content) for choice in whole.choices] == [(0, "aaa"), (1, "bbb"), (2, "ccc")]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 9)
        texts = {0: "", 1: "", 2: ""}
        roles = []
        async for chunk in await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, n=3, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
        assert texts == {0: "aaa", 1: "bbb", 2: "ccc"}
        assert sorted(roles) == [0, 1, 2]


async def test_log_probabilities_of_a_chat():
    async with door(lambda request, branch, position: [0xC3, 0xA9, ord("!")][position]) as served, sdk(served) as client:
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
        choice = whole.choices[0]
        assert choice.message.content == "é!"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        first, second, third = choice.logprobs.content
        assert (first.token, first.bytes, first.logprob) == ("\\xc3", [0xC3], -(0xC3 % 7) / 2)
        assert b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode() == "é!"
        assert [(top.token, top.logprob) for top in third.top_logprobs] == [("!", 0.0), ('"', -0.25)]
        assert (third.token, third.logprob) == ("!", -9999.0), "JSON has no minus infinity"
        assert len(second.top_logprobs) == 2
        streamed: list[Any] = []
        chunks = await client.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2, stream=True
        )
        async for chunk in chunks:
            if chunk.choices[0].logprobs is not None:
                streamed += chunk.choices[0].logprobs.content or []
        assert streamed == choice.logprobs.content
        without = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, logprobs=True)
        assert without.choices[0].logprobs is not None
        assert [entry.top_logprobs for entry in without.choices[0].logprobs.content or []] == [[], [], []]


async def test_a_text_completion_with_echo_and_log_probabilities():
    async with door() as served, sdk(served) as client:
        whole = await client.completions.create(model="fake", prompt="ä!b", max_tokens=2, echo=True, logprobs=1)
        (choice,) = whole.choices
        assert choice.text == "ä!bä"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa4", "!", "b", "bytes:\\xc3", "bytes:\\xa4"][:6]
        assert choice.logprobs.text_offset == [0, 0, 1, 2, 3, 3]
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[2] == -9999.0
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.top_logprobs[:1] == [None]
        assert choice.logprobs.top_logprobs[3] == {"b": 0.0}
        alone = await client.completions.create(model="fake", prompt="ä!b", max_tokens=1, logprobs=0)
        assert alone.choices[0].logprobs is not None
        assert alone.choices[0].logprobs.top_logprobs == [{"bytes:\\xc3": -(0xC3 % 7) / 2}]


async def test_scoring_a_prompt_as_evaluation_harnesses_do():
    async with door() as served, sdk(served) as client:
        scored = await client.completions.create(model="fake", prompt=[97, 98, 99], max_tokens=0, echo=True, logprobs=1)
        (choice,) = scored.choices
        assert (choice.text, choice.finish_reason) == ("abc", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["a", "b", "c"]
        assert choice.logprobs.token_logprobs == [None, 0.0, -(99 % 7) / 2]


async def test_a_completion_that_says_nothing_of_its_length_has_sixteen_tokens():
    async with door() as served, sdk(served) as client:
        assert (await client.completions.create(model="fake", prompt="ab")).choices[0].text == "ab" * 8
        assert (await client.completions.create(model="fake", prompt=["ab"], max_tokens=3)).choices[0].text == "aba"
        assert (await client.completions.create(model="fake", prompt=[[97]], max_tokens=2, stop="x")).choices[0].text == "aa"


async def test_usage_in_a_stream_comes_as_it_was_asked_for():
    async with door() as served, sdk(served) as client:

        async def chunks(options: Any) -> list[Any]:
            created = await client.chat.completions.create(
                model="fake", messages=HELLO, max_tokens=4, stream=True, stream_options=options
            )
            return [chunk async for chunk in created]

        *others, last = await chunks({"include_usage": True})
        assert last.choices == []
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (8, 4)
        assert all("usage" in chunk.model_fields_set and chunk.usage is None and chunk.choices for chunk in others)
        for options in ({}, {"include_usage": False}, {"continuous_usage_stats": True}):
            assert all("usage" not in chunk.model_fields_set and chunk.choices for chunk in await chunks(options))
        *others, last = await chunks({"include_usage": True, "continuous_usage_stats": True})
        counts = [chunk.usage.completion_tokens for chunk in (*others, last)]
        assert counts == sorted(counts)
        assert counts[-1] == 4


async def test_embeddings_in_all_forms():
    async with door() as served, sdk(served) as client:
        for given, count in (("abc", 1), (["abc", "d"], 2), ([97, 98], 1), ([[97], [98, 99]], 2)):
            made = await client.embeddings.create(model="fake", input=given)  # type: ignore[arg-type]  # all forms at once
            assert [(each.index, each.embedding) for each in made.data] == [
                (index, pytest.approx([0.6, 0.0, -0.8])) for index in range(count)
            ]
            assert made.usage.prompt_tokens == sum(1 if isinstance(one, int) else len(one) for one in given)
        raw = await client.embeddings.create(model="fake", input="abc", encoding_format="float", extra_body={"normalize": False})
        assert raw.data[0].embedding == [3.0, 0.0, -4.0]
        written = await client.embeddings.with_raw_response.create(model="fake", input="abc", encoding_format="base64")
        text = written.http_response.json()["data"][0]["embedding"]
        assert list(array.array("f", base64.b64decode(text))) == pytest.approx([0.6, 0.0, -0.8])
        many = await client.embeddings.create(model="fake", input=["x"] * 100)
        assert len(many.data) == 100
        with pytest.raises(openai.BadRequestError, match="2049 inputs; send at most 2048"):
            await client.embeddings.create(model="fake", input=["x"] * 2049)
        with pytest.raises(openai.BadRequestError, match="3 dimensions"):
            await client.embeddings.create(model="fake", input="abc", dimensions=2)


async def test_models():
    async with door() as served, sdk(served) as client:
        (only,) = (await client.models.list()).data
        assert (only.id, only.object, only.owned_by, only.model_dump()["max_model_len"]) == ("fake", "model", "streamkv", 256)
        assert await client.models.retrieve("fake") == only
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/other")


async def test_errors_are_the_exceptions_that_the_client_knows():
    async with door() as served, sdk(served) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="fake", messages=HELLO, top_p=2)
        assert (bad.value.param, bad.value.code) == ("top_p", "invalid_request")
        with pytest.raises(openai.NotFoundError) as other:
            await create(model="gpt-4o", messages=HELLO)
        assert other.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await create(model="fake", messages=[{"role": "user", "content": "x" * 300}])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(
            openai.BadRequestError, match=r'response_format is not served; leave it out, or send \{"type": "text"\}'
        ):
            await create(model="fake", messages=HELLO, response_format={"type": "json_object"})
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            await create(model="fake", messages=HELLO, tool_choice="required")
        with pytest.raises(openai.BadRequestError, match="129 prompts; send at most 128"):
            await client.completions.create(model="fake", prompt=["a"] * 129)

        async def busy(request: Any) -> None:
            raise OverloadedError("the queue is full", retry_after_s=2.1)

        served.engine.submit = busy  # type: ignore[method-assign]  # what a full engine does
        with pytest.raises(openai.RateLimitError) as full:
            await create(model="fake", messages=HELLO)
        assert full.value.response.headers["Retry-After"] == "3"

        async def broken(request: Any) -> None:
            raise ZeroDivisionError("secret inside")

        served.engine.submit = broken  # type: ignore[method-assign]  # what nobody has foreseen
        with pytest.raises(openai.InternalServerError) as failed:
            await create(model="fake", messages=HELLO)
        assert "secret" not in str(failed.value)


async def test_an_error_in_a_stream_is_raised_by_the_client():
    async with door() as served, sdk(served) as client:
        served.engine.fail_after = 3  # type: ignore[attr-defined]  # a KnowingEngine
        stream = await client.completions.create(model="fake", prompt="abc", max_tokens=9, stream=True)
        seen = ""

        async def read() -> None:
            nonlocal seen
            async for chunk in stream:
                seen += chunk.choices[0].text

        with pytest.raises(openai.APIError, match="NaN") as failed:
            await read()
        assert (seen, failed.value.code) == ("abc", "numerical_error")
        with pytest.raises(openai.InternalServerError, match="NaN"):
            await client.completions.create(model="fake", prompt="abc", max_tokens=9)


async def test_leaving_a_stream_cancels_it():
    async with door(context=100_000) as served, sdk(served) as client:
        served.engine.hold = 3
        stream = await client.completions.create(model="fake", prompt="abc", max_tokens=50_000, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await served.quiet()


async def test_many_at_once_on_one_client():
    async with door() as served, sdk(served) as client:

        async def one(number: int) -> str:
            text = f"<{number}>"
            made = await client.completions.create(model="fake", prompt=text, max_tokens=len(text), stream=True)
            return "".join([chunk.choices[0].text async for chunk in made])

        assert await asyncio.gather(*map(one, range(40))) == [f"<{number}>" for number in range(40)]

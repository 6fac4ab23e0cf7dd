"""Every answer, field by field, against the types of openai-python, which are made from OpenAI's published description."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from openai.types import Completion, CreateEmbeddingResponse, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from streamkv.errors import OverloadedError, RateLimitedError, StreamKVError
from streamkv.server.guard import error_of
from tests.server.openai.dialect import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, door, get, post, stream

OURS = {"prompt_logprobs", "max_model_len"}
"""Fields that OpenAI does not have; vLLM does."""

EVERYTHING: dict[str, Any] = {"max_tokens": 3, "n": 2, "seed": 1}
CHAT_BODY = EVERYTHING | {"messages": HELLO, "service_tier": "auto", "logprobs": True, "top_logprobs": 2}
COMPLETION_BODY = EVERYTHING | {"prompt": ["ab", "cde"], "logprobs": 2, "echo": True}
USAGE = {"stream_options": {"include_usage": True}}


def check(kind: type[pydantic.BaseModel], answer: Any) -> Any:
    """All that the type requires is there, everything is of the declared type, and nothing else is there but `OURS`."""
    parsed = kind.model_validate(answer, strict=True)
    assert not unknown(parsed) - OURS, answer
    return parsed


def unknown(value: Any) -> set[str]:
    if isinstance(value, pydantic.BaseModel):
        own = set(value.model_extra or {})
        return own.union(*(unknown(getattr(value, name)) for name in type(value).model_fields))
    if isinstance(value, list):
        return set().union(*map(unknown, value))
    return set()


def ended(chunk: dict[str, Any]) -> dict[str, Any]:
    """With an end where there is none yet: the type has forgotten that streamed text completions say null before."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    return chunk | {"choices": choices}


def known_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls of an echoed prompt's first token, of which the type does not know either."""
    for choice in answer["choices"]:
        if choice["logprobs"] is not None:
            for name in ("token_logprobs", "top_logprobs"):
                choice["logprobs"][name] = [entry for entry in choice["logprobs"][name] if entry is not None]
    return answer


async def test_chat_completion():
    async with door() as served:
        _, answer, _ = await post(served, CHAT, CHAT_BODY | {"prompt_logprobs": 1})
        check(ChatCompletion, answer)
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        assert answer["service_tier"] == "default"
        assert answer["system_fingerprint"].startswith("fp_")
        for choice in answer["choices"]:
            assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
            assert choice["message"] == {"role": "assistant", "content": "he", "refusal": None}
            for entry in choice["logprobs"]["content"]:
                assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
                assert [set(top) for top in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
            assert choice["logprobs"]["refusal"] is None
        assert set(answer["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
        _, plain, _ = await post(served, CHAT, {"messages": HELLO, "max_tokens": 1})
        assert plain["choices"][0]["logprobs"] is None
        assert "service_tier" not in plain, "it is told to who has asked"
        assert plain["system_fingerprint"] == answer["system_fingerprint"]


async def test_chat_completion_chunk():
    async with door() as served:
        chunks = await stream(served, CHAT, CHAT_BODY | USAGE)
        *before, last = [check(ChatCompletionChunk, chunk) for chunk in chunks]
        assert {
            (chunk.object, chunk.id, chunk.created, chunk.model, chunk.service_tier, chunk.system_fingerprint)
            for chunk in (*before, last)
        } == {("chat.completion.chunk", last.id, last.created, "fake", "default", last.system_fingerprint)}
        assert (last.choices, last.usage.total_tokens) == ([], 8 + 6)
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        for index in range(2):
            deltas = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
            assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
            assert [set(delta["delta"]) for delta in deltas[1:-1]] == [{"content"}] * (len(deltas) - 2)
            assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "length")
            assert [delta["finish_reason"] for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        plain = await stream(served, CHAT, CHAT_BODY)
        assert all("usage" not in chunk and chunk["choices"] for chunk in plain), "nobody has asked for it"


async def test_text_completion():
    async with door() as served:
        _, answer, _ = await post(served, COMPLETIONS, COMPLETION_BODY | {"prompt_logprobs": 1})
        check(Completion, known_logprobs(answer))
        assert answer["object"] == "text_completion"
        assert answer["id"].startswith("cmpl-")
        assert [set(choice) for choice in answer["choices"]] == [
            {"index", "text", "logprobs", "finish_reason", "prompt_logprobs"}
        ] * 4
        *before, last = await stream(served, COMPLETIONS, COMPLETION_BODY | USAGE)
        for chunk in (*before, last):
            check(Completion, known_logprobs(ended(chunk)))
            assert (chunk["object"], chunk["id"]) == ("text_completion", last["id"])
        assert (last["choices"], last["usage"]) == ([], answer["usage"])
        assert [chunk["usage"] for chunk in before] == [None] * len(before)


async def test_embeddings_and_models():
    async with door() as served:
        _, answer, _ = await post(served, EMBEDDINGS, {"input": ["a", "bc"], "encoding_format": "float"})
        check(CreateEmbeddingResponse, answer)
        assert (answer["object"], [each["object"] for each in answer["data"]]) == ("list", ["embedding"] * 2)
        _, listed, _ = await get(served, "/v1/models")
        assert listed["object"] == "list"
        for model in (*listed["data"], (await get(served, "/v1/models/fake"))[1]):
            check(Model, model)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (StreamKVError("x"), 500, "server_error"),
        (OverloadedError("x", retry_after_s=0.1), 429, "rate_limit_error"),
        (RateLimitedError("x", retry_after_s=2.0), 429, "rate_limit_error"),
    ],
)
def test_errors_say_of_which_kind_they_are(error: StreamKVError, status: int, kind: str):
    answer = error_of(error)
    assert answer.status == status
    assert f'"type": "{kind}"'.encode() in bytes(answer.body)  # type: ignore[arg-type]  # it has one


async def test_every_error_has_the_four_fields():
    async with door(api_key="sk-0123456789abcdef") as served:
        key = {"Authorization": "Bearer sk-0123456789abcdef"}
        answers = [
            await post(served, CHAT, {"messages": HELLO}),
            await post(served, CHAT, {"messages": HELLO, "top_p": 5}, **key),
            await post(served, CHAT, {"messages": HELLO, "model": "other"}, **key),
            await get(served, "/v1/nothing", **key),
        ]
        for _status, answer, _ in answers:
            assert set(answer) == {"error"}
            check(ErrorObject, answer["error"])
            assert (set(answer["error"]), answer["error"]["type"]) == (
                {"message", "type", "param", "code"},
                "invalid_request_error",
            )
        assert [status for status, _, _ in answers] == [401, 400, 404, 404]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
        (CHAT, {"messages": HELLO, "max_tokens": 250}),
        (CHAT, {"messages": HELLO, "max_tokens": 256}),
        (COMPLETIONS, {"prompt": [1] * 257}),
        (EMBEDDINGS, {"input": "x" * 300}),
        (EMBEDDINGS, {"input": [1] * 300}),
        ("/detokenize", {"tokens": [1] * 300}),
    ],
)
async def test_what_is_too_long_is_said_in_the_words_that_clients_look_for(path: str, body: dict[str, Any]):
    async with door() as served:
        status, answer, _ = await post(served, path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["message"].startswith("this model's maximum context length is 256 tokens; ")

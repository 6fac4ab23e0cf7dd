"""/openapi.json is a valid document, names every route, and real requests and answers are as it says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from streamkv.engine.fake import fake_info
from streamkv.errors import InvalidRequestError
from streamkv.protocol.bodies import check_body, decode_body
from streamkv.server.openai.openapi import document
from streamkv.server.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    check_generation,
    check_priority,
)
from streamkv.server.principal import ANONYMOUS, set_principal
from tests.server.bad_values import encoded_fields
from tests.server.openai.dialect import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, door, door_of, get, post, stream


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema | {"components": document["components"]})


def schema_of(document: dict[str, Any], method: str, path: str, status: str = "200", kind: str = "application/json") -> Any:
    return document["paths"][path][method]["responses"][status]["content"][kind]["schema"]


async def test_the_document_is_valid_and_names_every_route():
    async with door() as served:
        _, served_document, _ = await get(served, "/openapi.json")
        assert served_document == document(needs_key=False)
        OpenAPIV31SpecValidator(served_document).validate()
        assert served_document["security"] == []
        named = {(method.upper(), path) for path, item in served_document["paths"].items() for method in item}
        assert named == {(route.method, route.path.replace(":.+}", "}")) for route in door_of(served).routes()}


async def test_it_says_whether_a_key_is_needed():
    async with door(api_key="sk-0123456789abcdef") as served:
        assert (await get(served, "/openapi.json"))[0] == 401
        _, described, _ = await get(served, "/openapi.json", Authorization="Bearer sk-0123456789abcdef")
        OpenAPIV31SpecValidator(described).validate()
        assert described["security"] == [{"key": []}]


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "n": 2}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 1, "stop": "x"}),
    (COMPLETIONS, {"prompt": "abc", "max_tokens": 3, "echo": True, "logprobs": 2, "logit_bias": {"5": 1.5}}),
    (COMPLETIONS, {"prompt": [[97]], "max_tokens": 3, "prompt_logprobs": 0}),
    (EMBEDDINGS, {"input": ["a", "b"]}),
    (EMBEDDINGS, {"input": [1, 2], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "abc", "return_token_strs": True}),
    ("/tokenize", {"messages": HELLO}),
    ("/detokenize", {"tokens": [97]}),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=lambda value: value if isinstance(value, str) else "")
async def test_requests_and_answers_are_as_described(path: str, body: dict[str, Any]):
    described = document(needs_key=False)
    async with door() as served:
        request = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator(described, request).validate(body)
        status, answer, _ = await post(served, path, body)
        assert status == 200, answer
        validator(described, schema_of(described, "post", path)).validate(answer)
        if "messages" in body or "prompt" in body:
            body = {name: value for name, value in body.items() if name != "prompt_logprobs"}
            if path in (CHAT, COMPLETIONS):
                options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
                for chunk in await stream(served, path, body | options):
                    validator(described, schema_of(described, "post", path, kind="text/event-stream")).validate(chunk)
        _, refusal, _ = await post(served, path, [])
        validator(described, schema_of(described, "post", path, "default")).validate(refusal)


async def test_models_are_as_described():
    described = document(needs_key=False)
    async with door() as served:
        for asked, path in (("/v1/models", "/v1/models"), ("/v1/models/fake", "/v1/models/{model}")):
            status, answer, _ = await get(served, asked)
            assert status == 200
            validator(described, schema_of(described, "get", path)).validate(answer)


def test_the_description_is_not_so_wide_that_it_says_nothing():
    described = document(needs_key=False)
    chat = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check = validator(described, chat)
    assert not check.is_valid({})
    assert not check.is_valid({"messages": HELLO, "n": "2"})
    assert not check.is_valid({"messages": [{"content": "a"}]})
    answer = validator(described, schema_of(described, "post", CHAT))
    assert not answer.is_valid({"id": "x", "choices": []})


# -- value by value ----------------------------------------------------------------------------------------------------

NUMBERS = [
    *(0, -1, 1, 2, 5, 16, 17, 20, 21, 300, 2**24, 2**24 + 1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63),
    *(0.5, 0.999, 1.001, 1.5, -0.1, -2.1, 2.1, 10.5, 99.5, 100.5, 1e300),
]
TEXTS = ["", "a", "x" * 64, "x" * 65, "x" * 256, "x" * 257, "auto", "none", "medium", "mean", "last", "base64", "user", "tool"]
LISTS = [
    *([], [0], [-1], [2**31], ["a"], [""], ["x" * 64], ["x" * 65], [[1]], [["a"]], [None], [1.5], [True], ["text"], [{}]),
    *([0] * count for count in (16, 17, 128, 129, 1024, 1025)),
    *(["a"] * count for count in (4, 5, 128, 129)),
]
OBJECTS = [
    *(
        {},
        {"5": 1},
        {"5": 100.5},
        {"5": -101},
        {"5": "a"},
        {"a": 1},
        {"-5": 1},
        {"05": 1},
        {"type": "text"},
        {"type": "json_object"},
    ),
    *({str(number): 1 for number in range(count)} for count in (8, 9, 300, 301)),
]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *LISTS, *OBJECTS]
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "max_tokens": {"prompt_logprobs": 0},
    "max_completion_tokens": {"prompt_logprobs": 0},
    "min_tokens": {"max_tokens": 2**24},
    "stream_options": {"stream": True},
}
"""What a field needs beside it: a schema does not know of that."""
UNSAID = {"model", "dimensions"}
"""Fields whose values depend on the model."""
INFO = fake_info(vocab_size=2**31, max_model_len=2**40, embedding_dim=8)


def takes(kind: type[Any], body: dict[str, Any]) -> bool:
    """Whether the door does, as far as it can tell without a tokenizer."""
    request = make_mocked_request("POST", "/")
    set_principal(request, ANONYMOUS)
    try:
        given = decode_body(msgspec.json.encode(body), kind)
        if kind is EmbeddingRequest:
            check_priority(given.priority)
            check_body(given, models=(INFO.model,), num_ids=None, max_model_len=INFO.max_model_len)
        else:
            check_generation(request, given, INFO)
    except InvalidRequestError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "valid"),
    [
        (ChatCompletionRequest, {"messages": HELLO}),
        (CompletionRequest, {"prompt": "a"}),
        (EmbeddingRequest, {"input": "a"}),
    ],
)
def test_the_schema_takes_what_the_door_takes(kind: type[Any], valid: dict[str, Any]):
    described = document(needs_key=False)
    properties = described["components"]["schemas"][kind.__name__]["properties"]
    assert validator(described, {"$ref": f"#/components/schemas/{kind.__name__}"}).is_valid(valid)
    assert takes(kind, valid)
    seen = set()
    for name in encoded_fields(kind):
        if name in UNSAID:
            continue
        schema = validator(described, properties[name])
        for value in VALUES:
            body = valid | BESIDE.get(name, {}) | {name: value}
            taken = takes(kind, body)
            assert schema.is_valid(value) == taken, f"{name}={str(value)[:60]!r} is {'taken' if taken else 'refused'}"
            seen.add((name, taken))
    assert {name for name, taken in seen if taken} >= set(encoded_fields(kind)) - UNSAID - {"messages"}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function", "root", "", None, 5])
def test_the_schema_knows_the_roles(role: Any):
    body = {"messages": [{"role": role, "content": "a"}]}
    schema = validator(document(needs_key=False), {"$ref": "#/components/schemas/ChatCompletionRequest"})
    assert schema.is_valid(body) == takes(ChatCompletionRequest, body)

"""/openapi.json is a valid document, names every route, and real requests and answers are as it says."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from streamkv.server.openai.openapi import document
from tests.server.openai.dialect import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, door, door_of, get, post, stream


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema | {"components": document["components"]})


def schema_of(document: dict[str, Any], method: str, path: str, status: str = "200", kind: str = "application/json") -> Any:
    return document["paths"][path][method]["responses"][status]["content"][kind]["schema"]


async def test_the_document_is_valid_and_names_every_route():
    async with door() as served:
        _, served_document, _ = await get(served, "/openapi.json")
        assert served_document == document()
        OpenAPIV31SpecValidator(served_document).validate()
        named = {(method.upper(), path) for path, item in served_document["paths"].items() for method in item}
        assert named == {(route.method, route.path.replace(":.+}", "}")) for route in door_of(served).routes()}


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
    described = document()
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
    described = document()
    async with door() as served:
        for asked, path in (("/v1/models", "/v1/models"), ("/v1/models/fake", "/v1/models/{model}")):
            status, answer, _ = await get(served, asked)
            assert status == 200
            validator(described, schema_of(described, "get", path)).validate(answer)


def test_the_description_is_not_so_wide_that_it_says_nothing():
    described = document()
    chat = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check = validator(described, chat)
    assert not check.is_valid({})
    assert not check.is_valid({"messages": HELLO, "n": "2"})
    assert not check.is_valid({"messages": [{"content": "a"}]})
    answer = validator(described, schema_of(described, "post", CHAT))
    assert not answer.is_valid({"id": "x", "choices": []})

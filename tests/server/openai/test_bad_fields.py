"""The table of bad input over HTTP: every field with every bad value is 400 with its name, before anything is tokenised."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from dataclasses import replace
from typing import Any, Final

import pytest

from streamkv.protocol import body_structs
from streamkv.server.openai import requests, tokenize
from tests.server.bad_values import (
    BODIES,
    HUGE,
    LONG,
    NOT_FLAG,
    NOT_IDS,
    NOT_INTEGER,
    NOT_TEXT,
    VALID_BODY,
    Bad,
    encoded_fields,
    writable,
)
from tests.server.openai.dialect import CHAT, COMPLETIONS, EMBEDDINGS, door, get, post
from tests.server.serving import CONTEXT, VOCAB, Serving, eventually

_STREAMED: Final = {"stream": True}
_OWN: Final[dict[str, list[Bad]]] = {
    "stream": [Bad(NOT_FLAG)],
    "stream_options": [
        Bad(("a", 5, 1.5, True, []), beside=_STREAMED),
        Bad(({}, {"include_usage": True})),
        Bad(({"include_usage": True},), beside={"stream": False}),
        Bad(({"include_usage": "yes"}, {"include_usage": 1}), param="stream_options.include_usage", beside=_STREAMED),
        Bad(({"continuous_usage_stats": 1},), param="stream_options.continuous_usage_stats", beside=_STREAMED),
    ],
    "priority": [Bad((*NOT_INTEGER, 2**31, -(2**31) - 1, *HUGE))],
    "prompt_logprobs": [Bad((0, 1), beside=_STREAMED)],
}
_SEVERAL: Final = (["a", "b"], [[1, 2], [3]])  # several prompts; a stream of a WebSocket has one
_ONE_SAMPLE: Final = 2  # in the WebSocket's table `n` must agree with the ids; here it says how many there are


def _generating(api: str) -> dict[str, list[Bad]]:
    table = {field: list(bads) for field, bads in BODIES[api].items()}
    table["n"] = [Bad(tuple(value for value in bad.values if value != _ONE_SAMPLE)) for bad in table["n"]]
    if "prompt" in table:
        table["prompt"] = [
            *(replace(bad, values=tuple(value for value in bad.values if value not in _SEVERAL)) for bad in table["prompt"]),
            Bad((["a", ""], ["a", []], [[1], []]), param="prompt[1]"),
            Bad((["a", 1], [[1], 2])),
            Bad((["a", "x" * CONTEXT], [[1], [1] * CONTEXT]), param="prompt[1]", code="context_length_exceeded", tokenised=True),
            Bad(([[1], [VOCAB]],), param="prompt[1]"),
        ]
    if api == "chat":
        table["service_tier"] = [Bad(NOT_TEXT)]
    for field, bads in _OWN.items():
        table[field] = [*table.get(field, []), *bads]
    return table


def _embeddings() -> dict[str, list[Bad]]:
    several = (["a", "b"], [[1], [2]])
    table = {
        field: [
            Bad(tuple(v for v in bad.values if v not in several), bad.param, bad.code, tokenised=bad.tokenised) for bad in bads
        ]
        for field, bads in BODIES["embeddings"].items()
    }
    return table | {
        "encoding_format": [Bad((*NOT_TEXT, "", "int8", "FLOAT"))],
        "dimensions": [Bad((*NOT_INTEGER, 0, 2, 4, -3, *HUGE))],
        "normalize": [Bad(NOT_FLAG)],
        "priority": _OWN["priority"],
    }


_MODEL: Final = BODIES["completions"]["model"]
TABLES: Final[dict[str, dict[str, list[Bad]]]] = {
    CHAT: _generating("chat"),
    COMPLETIONS: _generating("completions"),
    EMBEDDINGS: _embeddings(),
    "/tokenize": {
        "model": _MODEL,
        "prompt": [
            Bad((5, 1.5, True, [], {}, None)),
            Bad((LONG,), code="context_length_exceeded"),
            Bad(("a",), beside={"messages": [{"role": "user", "content": "a"}]}),
        ],
        "messages": [Bad(("a", 5, True, {})), Bad(([{}],), param="messages[0].role")],
        "tools": [Bad(("a", 5, True, {})), Bad(([5],), param="tools[0]")],
        "add_generation_prompt": [Bad(NOT_FLAG)],
        "add_special_tokens": [Bad((*NOT_FLAG, False))],
        "return_token_strs": [Bad(NOT_FLAG)],
        "continue_final_message": [Bad((*NOT_FLAG, True))],
        "chat_template": [Bad(("{{ x }}", 5))],
        "chat_template_kwargs": [Bad(({"tokenize": True}, 5))],
    },
    "/detokenize": {
        "model": _MODEL,
        "tokens": [
            Bad((None, "a", 5, True, {}, *([value] for value in NOT_IDS if value < 2**63))),
            Bad((["a"], [1.5], [True], [None]), param="tokens[0]"),
            Bad(([1] * (CONTEXT + 1),), code="context_length_exceeded"),
        ],
    },
}
VALID: Final[dict[str, dict[str, Any]]] = {
    CHAT: VALID_BODY["chat"],
    COMPLETIONS: VALID_BODY["completions"],
    EMBEDDINGS: VALID_BODY["embeddings"],
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [97]},
}
STRUCTS: Final = {
    CHAT: requests.ChatCompletionRequest,
    COMPLETIONS: requests.CompletionRequest,
    EMBEDDINGS: requests.EmbeddingRequest,
    "/tokenize": tokenize.TokenizeRequest,
    "/detokenize": tokenize.DetokenizeRequest,
}


def matches(param: str | None, wanted: str) -> bool:
    wanted = wanted.replace("body.", "")
    if wanted.endswith("*"):
        return (param or "").startswith(wanted[:-1])
    return param in wanted.split("|")


async def check(served: Serving, path: str, body: dict[str, Any], bad: Bad, field: str) -> None:
    calls = served.tokenizer.calls
    status, answer, _ = await post(served, path, body)
    error = answer["error"]
    assert status == (404 if bad.code == "model_not_found" else 400), (body, answer)
    assert error["code"] == bad.code, error
    assert matches(error["param"], bad.param or field), f"{error} does not name {bad.param or field}"
    assert served.tokenizer.calls == calls or bad.tokenised, "tokenised before the refusal"
    assert 0 < len(error["message"]) <= 300
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", TABLES)
async def test_every_field(path: str):
    async with door() as served:
        for field, bads in TABLES[path].items():
            name = field.partition("[")[0]
            for bad in bads:
                for value in bad.values:
                    body = VALID[path] | (bad.beside or {}) | {name: value}
                    if name == "max_completion_tokens":
                        del body["max_tokens"]
                    if path == "/tokenize" and name != "prompt" and name in ("messages", "tools"):
                        body = {"messages": [{"role": "user", "content": "a"}], name: value}
                    if writable(body, text=True):
                        await check(served, path, body, bad, name)
        assert not served.engine.requests, "bad input reached the engine"
        assert (await post(served, path, VALID[path]))[0] == 200


def test_the_tables_name_every_field_that_exists():
    for path, struct in STRUCTS.items():
        assert {field for field in TABLES[path] if "[" not in field} == set(encoded_fields(struct)), path


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_changes_nothing_and_what_is_not_known_is_accepted(path: str):
    kind = {CHAT: body_structs.ChatBody, COMPLETIONS: body_structs.CompletionBody}[path]
    async with door() as served:
        plain = (await post(served, path, VALID[path]))[1]["choices"]
        for name, harmless in body_structs.REFUSED[kind].items():
            for value in (None, *harmless):
                status, answer, _ = await post(served, path, VALID[path] | {name: value})
                assert (status, answer.get("choices")) == (200, plain), (name, value, answer)
        sdks = {
            "user": "me",
            "store": True,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "x" * 99: [1],
        }
        assert (await post(served, path, VALID[path] | sdks))[1]["choices"] == plain


# -- not even a body ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"a"', b"5", b"\xff", b"{}x", b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":"\\ud800"}'],
    ids=lambda data: repr(data[:12]),
)
@pytest.mark.parametrize("path", TABLES)
async def test_bodies_that_are_none(path: str, data: bytes):
    async with door() as served:
        headers = {"Content-Type": "application/json"}
        async with served.http.post(served.base + path, data=data, headers=headers) as response:
            error = json.loads(await response.read())["error"]
        assert (response.status, error["code"]) == (400, "invalid_request")
        assert served.tokenizer.calls == 0


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"]
)
async def test_what_is_not_said_to_be_json_is_not_read(kind: str | None):
    async with door() as served:
        for path in TABLES:
            headers = {"Content-Type": kind} if kind else {}
            data = json.dumps(VALID[path]).encode()
            async with served.http.post(served.base + path, data=data, headers=headers) as response:
                assert response.status == 415, path
        headers = {"Content-Type": "application/json; charset=utf-8"}
        async with served.http.post(served.base + COMPLETIONS, data=json.dumps(VALID[COMPLETIONS]), headers=headers) as response:
            assert response.status == 200


async def test_bodies_are_bounded():
    async with door() as served:
        headers = {"Content-Type": "application/json"}
        async with served.http.post(served.base + CHAT, data=io.BytesIO(b" " * (2 << 20)), headers=headers) as response:
            assert response.status == 413
        packed = gzip.compress(json.dumps(VALID[CHAT]).encode())
        async with served.http.post(served.base + CHAT, data=packed, headers=headers | {"Content-Encoding": "gzip"}) as response:
            assert response.status == 415
        assert (await post(served, CHAT, VALID[CHAT]))[0] == 200


async def test_pages_of_other_sites_and_other_names_are_refused():
    async with door() as served:
        assert (await post(served, CHAT, VALID[CHAT], Origin="https://evil.example"))[0] == 403
        assert (await post(served, CHAT, VALID[CHAT], Host="evil.example"))[0] == 403
        assert (await get(served, "/v1/models", Origin="null"))[0] == 403
        assert not served.engine.requests


async def test_bad_requests_do_not_disturb_a_running_one():
    async with door() as served:
        served.engine.hold = 3
        running = asyncio.create_task(post(served, COMPLETIONS, {"prompt": "alive ", "max_tokens": 12}))
        await eventually(lambda: len(served.engine.live) == 1)
        for body in ({"prompt": ""}, {"prompt": [VOCAB]}, {"prompt": "a", "n": 17}, {"prompt": "a", "stop": ["x"] * 5}):
            assert (await post(served, COMPLETIONS, body))[0] == 400
        await served.engine.release()
        assert (await running)[1]["choices"][0]["text"] == "alive " * 2

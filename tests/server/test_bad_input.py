"""Bad input: one clear error that names the field, before anything is tokenised; the connection and its streams go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamkv.protocol import bodies, body_structs
from streamkv.protocol import messages as m
from tests.server.bad_values import BODIES, CHAT, HELLO, MESSAGES, VALID, VALID_BODY, Bad, encoded_fields, writable
from tests.server.serving import Raw, Serving, serving

ALIVE = "the other stream on this connection "


@asynccontextmanager
async def beside_a_live_stream(codec: str) -> AsyncIterator[tuple[Serving, Raw]]:
    """A connection with a stream that is half way; it must come out whole at the end, and new streams must work."""
    async with serving() as served, served.raw(codec) as raw:
        served.engine.hold = 3
        await raw.create("alive", ALIVE, max_tokens=100)
        await raw.wait_for(lambda message: message["t"] == "delta" and message["o"] + message["n"] == 3)
        served.engine.hold = None
        await raw.synced()
        yield served, raw
        assert served.engine.live == ["c1-0.0"], "bad input reached the engine, or ended the live stream"
        await served.engine.release()
        last = await raw.wait_for_type("done", "alive")
        assert last["o"] == 100
        text = "".join(message["x"] for message in await raw.synced() if message["t"] == "delta")
        assert ALIVE[:3] + text == (ALIVE * 3)[:100]
        await raw.create("next", "abc", max_tokens=3)
        assert (await raw.ended("next")).text == "abc"


async def refused(raw: Raw) -> dict[str, Any]:
    """The one error that a bad frame is answered with."""
    error = await raw.wait_for(lambda message: message["t"] != "status")
    assert error["t"] == "error", f"{error} instead of an error"
    assert await raw.synced() == [], "more than one answer"
    assert 0 < len(error["message"]) <= 300
    assert "\n" not in error["message"]
    return error


def matches(param: str | None, wanted: str) -> bool:
    if wanted.endswith("*"):
        return (param or "").startswith(wanted[:-1])
    return param in wanted.split("|")


async def check(served: Serving, raw: Raw, message: dict[str, Any], bad: Bad, path: str) -> None:
    calls = served.tokenizer.calls
    await raw.send(**message)
    error = await refused(raw)
    assert (error["code"], error.get("id")) == (bad.code, None if bad.notice else "bad"), error
    assert matches(error.get("param"), bad.param or path), f"{error} does not name {bad.param or path}"
    assert served.tokenizer.calls == calls or bad.tokenised, "tokenised before the refusal"


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("api", "field"),
    [(api, field) for api, fields in BODIES.items() for field in fields],
)
async def test_every_field_of_a_body(codec: str, api: str, field: str):
    name = field.partition("[")[0]
    async with beside_a_live_stream(codec) as (served, raw):
        for bad in BODIES[api][field]:
            for value in bad.values:
                body = VALID_BODY[api] | (bad.beside or {}) | {name: value}
                if name == "max_completion_tokens":
                    del body["max_tokens"]
                if writable(body, text=raw.text):
                    await check(served, raw, {"t": "create", "id": "bad", "api": api, "body": body}, bad, f"body.{name}")


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in MESSAGES.items() for field in fields])
async def test_every_field_of_a_message(codec: str, kind: str, field: str):
    async with beside_a_live_stream(codec) as (served, raw):
        for bad in MESSAGES[kind][field]:
            for value in bad.values:
                message = {"t": kind} | VALID[kind] | (bad.beside or {}) | {field: value}
                if kind == "create" and field == "ids" and bad.beside is None:
                    del message["id"]
                if writable(message, text=raw.text):
                    await check(served, raw, message, bad, field)


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize("field", HELLO)
async def test_every_field_of_hello_ends_a_connection_that_has_not_begun(codec: str, field: str):
    async with serving() as served, served.raw(codec) as other:
        for value in HELLO[field]:
            async with served.raw(codec, hello=False) as raw:
                if writable(value, text=raw.text):
                    await raw.send(t="hello", **{field: value})
                    closed = await raw.closed()
                    assert (closed.code, field in closed.reason) == (4400, True), closed
        assert await other.synced() == []


def test_the_tables_name_every_field_that_exists():
    for kind in m.ClientMessage.__args__:
        tag = kind.__struct_config__.tag
        table = HELLO if tag == "hello" else MESSAGES[tag]
        assert set(table) == set(encoded_fields(kind)), f"fields of {tag}"
    assert set(MESSAGES) | {"hello"} == set(VALID) == {kind.__struct_config__.tag for kind in m.ClientMessage.__args__}
    assert set(bodies.APIS) == set(BODIES) == set(VALID_BODY)
    for api, struct in bodies.APIS.items():
        assert {field for field in BODIES[api] if "[" not in field} == set(encoded_fields(struct)), f"fields of {api}"
    assert {f"messages[].{name}" for name in encoded_fields(body_structs.ChatMessage)} == {
        field for field in CHAT if field.count("[]") == 1
    }
    assert {"messages[].content[].type", *(f"messages[].content[].{name}" for name in encoded_fields(body_structs.TextPart))} == {
        field for field in CHAT if field.count("[]") == 2
    }

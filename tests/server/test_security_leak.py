"""R-LEAK: whatever a client does wrong, what it is told is one of a closed set of codes and nothing of the server's inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamkv.errors import StreamKVError
from streamkv.server.routes import Access, status_of
from tests.server.bad_values import VALID
from tests.server.serving import serving
from tests.server.test_bad_frames import GARBAGE, NO_MESSAGE, WRONG_TYPES
from tests.server.test_guard import every_route
from tests.server.wire import Answer, ask, bearer, exchange, keyed

LEAKS = re.compile(
    r"0x[0-9a-f]{4,}|(?<![\w:/.])/(?:home|root|usr|opt|etc|tmp|var|work|src|lib|proc)/|Traceback|File \"|, line \d+|\.pyx?\b"
    r"|\b(?:streamkv|aiohttp|msgspec|asyncio|torch|transformers|tokenizers|numpy|uvloop|jinja2?)\.\w"
    r"|<(?:class|function|built-in|\w+ object)|\bobject at\b|site-packages|\bNoneType\b|self\."
    r"|(?:Key|Value|Type|Attribute|Index|Runtime|Assertion|OS|Memory|Recursion|Unicode\w+)Error",
    re.IGNORECASE,
)
CODES = {
    *("invalid_request", "model_not_found", "context_length_exceeded", "stream_exists", "too_many_streams", "overloaded"),
    *("draining", "kv_oom", "resume_gone", "fork_gone", "stalled_timeout", "unknown_type", "numerical_error", "engine_lost"),
    *("out_of_memory", "deadline_exceeded", "rate_limited", "internal"),  # those of the WebSocket; the rest is HTTP's
    *("unauthorized", "forbidden", "not_found", "method_not_allowed", "unsupported_media_type", "too_large", "timeout"),
}
LONG = "x" * 100_000

BODIES: list[bytes] = [
    b"",
    b"\0",
    b"{",
    b"null",
    b"[]",
    b"5",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b'{"a":1}{"b":2}',
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'{"prompt":' + b"9" * 100_000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": NaN}',
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    -(10**30),
    "",
    "x",
    LONG,
    [],
    [None],
    {},
    {"x": []},
    [[[]]],
    "\0",
    "%s%n{0}{self}",
]
FIELDS = [
    *(
        "model",
        "prompt",
        "messages",
        "input",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "logit_bias",
    ),
    *("echo", "stream", "stream_options", "priority", "cache_salt", "tokens", "user", "tools", "stop_token_ids"),
]


@pytest.mark.parametrize(
    "text",
    [
        "at 0x7f0012ab",
        "/home/me/x",
        'File "x"',
        "streamkv.server.guard",
        "<class 'int'>",
        "KeyError",
        "'NoneType' has no",
        "guard.py",
        "Traceback (most",
    ],
)
def test_r_leak_the_pattern_sees_what_is_planted(text: str):
    assert LEAKS.search(f"something {text} something")


def check(body: bytes, what: object) -> None:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, what
    assert error["code"] in CODES, what
    assert len(error["message"]) < 500, what
    assert not LEAKS.search(error["message"]), (what, error["message"])
    assert not LEAKS.search(error["param"] or ""), (what, error["param"])


async def test_r_leak_every_http_error(tmp_path: Path):
    """R-LEAK: every route x bodies that are none, every field x values that it does not have."""
    async with keyed(tmp_path) as served:
        seen: set[tuple[int, str]] = set()

        async def provoke(method: str, target: str, headers: dict[str, str], body: bytes | None) -> None:
            answer = await ask(served, method, target, headers, body)
            if answer.status >= 400:
                check(answer.body, (method, target, body and body[:100]))
                seen.add((answer.status, answer.code))

        for method, path, access in every_route(served.server):
            for target in (path, path + "/nothing", path + "?x=%00", path.replace("x", "%2e%2e%2f")):
                await provoke(method, target, {}, None)
                await provoke(method, target, bearer("acme"), None)
                await provoke("DELETE", target, bearer("acme"), None)
            if method != "POST" or access is not Access.CLIENT:
                continue
            for body in BODIES:
                await provoke(method, path, bearer("boss"), body)
            for field in FIELDS:  # not those of log-probabilities: this server's engine has none
                for value in VALUES:
                    whole = {"model": "fake", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
                    await provoke(method, path, bearer("boss"), json.dumps(whole | {field: value}).encode())
        assert {status for status, _ in seen} >= {400, 401, 404, 405}, seen
        assert 500 not in {status for status, _ in seen}, seen
        for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000):
            said = Answer.parse(await exchange(served.server.port, data))
            if said.status:
                check(said.body, data[:20])


@pytest.mark.parametrize("codec", ["json", "msgpack"])
async def test_r_leak_every_websocket_error(codec: str):
    """R-LEAK: frames that are no messages, fields of wrong types, bodies with wrong values; and every closing reason."""
    encode = msgspec.json.encode if codec == "json" else msgspec.msgpack.encode
    frames = [*GARBAGE[codec], *(encode(value) for value in NO_MESSAGE), *(encode({"t": value}) for value in WRONG_TYPES)]
    for kind in ("create", "cancel", "credit", "resume", "fork", "ping", "bye", "hello"):
        frames += [encode({"t": kind, "id": value}) for value in WRONG_TYPES if kind not in ("bye", "hello")]
    for field in FIELDS:
        frames += [
            encode({"t": "create", "id": "s", "api": "completions", "body": VALID | {field: value}})
            for value in _encodable(codec)
        ]
    async with serving() as served:
        told = 0
        for start in range(0, len(frames), 20):  # so few that the connection bears them
            async with served.raw(codec) as raw:
                for frame in frames[start : start + 20]:
                    await raw.send_frame(frame)
                for message in await raw.synced():
                    if message["t"] == "error":
                        told += 1
                        assert message["code"] in CODES
                        assert not LEAKS.search(message["message"]), message
                        assert len(message["message"]) < 500
        assert told > 200
        async with served.raw(codec, hello=False) as raw:
            await raw.send_frame(GARBAGE[codec][3])
            assert not LEAKS.search((await raw.closed()).reason)


def _encodable(codec: str) -> list[Any]:
    return [value for value in VALUES if codec == "json" or not (isinstance(value, int) and abs(value) > 2**63)]


def test_every_code_has_a_status_and_every_error_a_code_of_the_set():
    def below(kind: type[StreamKVError]) -> list[type[StreamKVError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    for kind in below(StreamKVError):
        if kind.__module__ == "streamkv.errors":
            assert kind.code in CODES, kind
            assert 400 <= status_of(kind("x")) < 600

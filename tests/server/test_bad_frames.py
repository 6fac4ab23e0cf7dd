"""Frames that are no message at all, and the bounds themselves: what is just allowed works."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from streamkv.protocol.messages import MAX_CREDIT
from tests.server.bad_values import VALID
from tests.server.serving import CONTEXT, VOCAB, eventually, serving
from tests.server.test_bad_input import beside_a_live_stream, refused
from tests.server.websocket_cases import CONTINUATION, TEXT, frame, json_ping

CODECS = ["json", "msgpack"]

GARBAGE: dict[str, list[bytes]] = {
    "json": [
        b"",
        b"\0",
        b"{",
        b'{"t":"ping","ts":NaN}',
        b'{"t":"ping","ts":1}{"t":"ping","ts":2}',
        b'{"t":"ping","ts":1' + b"0" * 5000 + b"}",
        b"{'t':'ping'}",
        b'{"t":"create","id":"bad","api":"completions","body":{"prompt":"a","top_p":Infinity}}',
        b'{"t":"cancel","id":"\\ud800"}',
        b"[" * 100_000,
        b'{"t":' * 100_000,
    ],
    "msgpack": [
        b"",
        b"\xc1",
        b"\xff\xfe\xfd" * 100,
        b"\x81",
        b"\xdd\xff\xff\xff\xff",  # an array of 4 Gi entries, says its header
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x81\x80\x01",  # a map as key
        b"\x81\xa1t\xa2\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1t" * 100_000,
        msgspec.msgpack.encode({"t": "ping", "ts": 1.0}) * 2,
    ],
}

NO_UTF8: list[bytes] = [
    b"\xff\xfe\xfd" * 100,
    b'{"t":"cancel","id":"\xff"}',
    b'{"t":"ping","ts":1,"unknown":"\xff"}',  # where the decoder does not look
    b'{"t":"create","id":"bad","api":"completions","body":{"prompt":"a","unknown":"\xc3\x28"}}',
    b'{"t":"create","id":"bad","api":"completions","body":{"prompt":"\xed\xa0\x80"}}',  # a surrogate
    b'{"t":"ping","ts":1,"unknown":"\xc0\xaf"}',  # more bytes than needed
    b'{"t":"ping","ts":1,"unknown":"\xf4\x90\x80\x80"}',  # beyond U+10FFFF
    b'{"t":"ping","ts":1,"unknown":"\xe2\x82"',  # unfinished, as is the JSON
]

NO_MESSAGE: list[Any] = [None, True, 5, 1.5, "ping", [], {}, [{"t": "ping"}], {"T": "ping"}, {"t": "welcome"}, {"type": "ping"}]
WRONG_TYPES: list[Any] = [None, 5, 1.5, True, "", "PING", "unknown", "x" * 100_000, [], {}, ["ping"]]


@pytest.mark.parametrize("codec", CODECS)
async def test_garbage_is_one_notice(codec: str):
    async with beside_a_live_stream(codec) as (_, raw):
        for frame in GARBAGE[codec]:
            await raw.send_frame(frame)
            error = await refused(raw)
            assert error["code"] in ("invalid_request", "unknown_type"), (frame[:40], error)
            assert "id" not in error


@pytest.mark.parametrize("hello", [True, False])
@pytest.mark.parametrize("frame", NO_UTF8)
async def test_text_that_is_no_utf8_ends_its_connection_and_nothing_else(frame: bytes, hello: bool):
    """RFC 6455, 8.1: with 1007. Its session is over, as after every breach of the protocol."""
    async with beside_a_live_stream("json") as (served, other):
        async with served.raw(hello=hello) as raw:
            if hello:
                served.engine.hold = 1
                await raw.create("mine", "abc", max_tokens=100)
                await raw.wait_for_type("delta", "mine")
                served.engine.hold = None
            await raw.send_frame(frame)
            closed = await raw.closed()
            assert (closed.code, closed.reason.partition(":")[0]) == (1007, "invalid_utf8")
        await eventually(lambda: len(served.engine.live) == len(served.server.stream_door.sessions) == 1)
        assert await other.synced() == []


async def test_text_of_every_language_is_utf8():
    async with serving() as served, served.raw() as raw:
        for text in ("ä€𝄞", "\u0000", "\U0010ffff", "\ufdd0\ufffe\ufffd", "日本語" * 100_000):
            await raw.send(t="ping", ts=1.0, unknown=text)
            assert (await raw.receive())["t"] == "pong"


@pytest.mark.parametrize("codec", CODECS)
async def test_values_that_are_no_message_and_types_that_are_unknown(codec: str):
    async with beside_a_live_stream(codec) as (_, raw):
        for value in [*NO_MESSAGE, *({"t": kind} for kind in WRONG_TYPES)]:
            await raw.send_frame(raw.encode(value))
            error = await refused(raw)
            assert (error["code"], error["param"], error.get("id")) == ("unknown_type", "t", None), value


@pytest.mark.parametrize("codec", CODECS)
async def test_a_body_nested_too_deeply_is_named_by_its_stream_or_as_a_notice(codec: str):
    async with beside_a_live_stream(codec) as (_, raw):
        nested = {
            "json": b'{"t":"create","id":"bad","api":"completions","body":{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
            "msgpack": b"\x84\xa1t\xa6create\xa2id\xa3bad\xa3api\xabcompletions\xa4body\x81\xa6prompt"
            + b"\x91" * 100_000
            + b"\x01",
        }[codec]
        await raw.send_frame(nested)
        error = await refused(raw)
        assert (error["code"], error["message"]) == ("invalid_request", "the message is nested too deeply")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", [kind for kind in VALID if kind not in ("hello", "bye", "create")])
async def test_unknown_fields_are_ignored(codec: str, kind: str):
    async with beside_a_live_stream(codec) as (_, raw):
        for extra in ({}, {"unknown": 1}, {"unknown": {"t": "bye", "id": ["deep"]}}):
            await raw.send(**({"t": kind} | VALID[kind] | extra))
        answers = await raw.synced()
        plain = [{key: value for key, value in answer.items() if key != "now"} for answer in answers]
        assert plain == plain[:1] * (0 if kind == "cancel" else 3)


@pytest.mark.parametrize("codec", CODECS)
async def test_unknown_fields_of_create_and_body_are_ignored(codec: str):
    async with serving() as served, served.raw(codec) as raw:
        extra = {"unknown": [1], "stream": True, "stream_options": {"include_usage": True}, "user": "me", "logit_bias": None}
        await raw.create("s", "abc", max_tokens=3, create_unknown=1, create_lp=True, **extra)
        assert (await raw.ended()).text == "abc"


@pytest.mark.parametrize("codec", CODECS)
async def test_the_first_frame_must_be_hello(codec: str):
    async with serving() as served, served.raw(codec) as other:
        first: list[bytes] = [
            *(other.encode({"t": kind} | VALID[kind]) for kind in VALID if kind != "hello"),
            *GARBAGE[codec],
            *(other.encode(value) for value in NO_MESSAGE),
        ]
        for frame in first:
            async with served.raw(codec, hello=False) as raw:
                await raw.send_frame(frame)
                closed = await raw.closed()
                assert closed.code == 4400, frame[:40]
                assert "hello" in closed.reason
        assert await other.synced() == []
        assert served.engine.live == []


@pytest.mark.parametrize("codec", CODECS)
async def test_a_second_hello_ends_the_connection_and_its_streams(codec: str):
    async with serving() as served, served.raw(codec) as raw:
        served.engine.hold = 1
        await raw.create("s", "abc", max_tokens=100)
        await raw.wait_for_type("delta", "s")
        await raw.send(t="hello")
        assert (await raw.closed()).code == 4400
        await served.quiet()


@pytest.mark.parametrize("codec", CODECS)
async def test_a_frame_of_the_other_kind_ends_only_this_connection(codec: str):
    async with beside_a_live_stream(codec) as (served, _):
        for hello in (False, True):
            async with served.raw(codec, hello=hello) as raw:
                await raw.send_frame(raw.encode({"t": "ping", "ts": 1.0}) if raw.text else b"{}", text=not raw.text)
                assert (await raw.closed()).code == 1003


@pytest.mark.parametrize("codec", CODECS)
async def test_a_frame_of_one_mebibyte_is_read_and_one_byte_more_ends_only_this_connection(codec: str):
    async with beside_a_live_stream(codec) as (served, raw):
        empty = len(raw.encode({"t": "ping", "ts": 1.0, "pad": ""})) + (0 if raw.text else 4)
        for size, allowed in ((1 << 20, True), ((1 << 20) + 1, False), (3 << 20, False)):
            frame = raw.encode({"t": "ping", "ts": 1.0, "pad": "x" * (size - empty)})
            assert len(frame) == size
            async with served.raw(codec) as victim:
                await victim.send_frame(frame)
                if allowed:
                    assert (await victim.receive())["t"] == "pong"
                else:
                    assert (await victim.closed()).code == 1009


async def test_a_client_that_sends_only_bad_frames_is_closed():
    async with beside_a_live_stream("json") as (served, _), served.raw() as raw:
        for _ in range(33):
            await raw.send_frame(b"{")
        closed = await raw.closed()
        assert closed.code == 1008
        assert len(raw._early) == 32


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        ("x", 1),
        ("x", CONTEXT - 1),
        ("x" * (CONTEXT - 1), 1),
        ("x" * (CONTEXT - 1), None),
        ([1] * (CONTEXT - 1), 1),
        ([1] * (CONTEXT - 1), None),
        ([VOCAB - 1, 0], 2),
    ],
)
async def test_prompts_at_the_bounds_are_served(codec: str, prompt: Any, max_tokens: int | None):
    async with serving() as served, served.raw(codec) as raw:
        await raw.create("s", prompt, max_tokens=max_tokens)
        ended = await raw.ended()
        assert (ended.reason, ended.count) == ("length", max_tokens or 1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"stop": "y" * 64},
        {"stop": ["y" * 64] * 4},
        {"stop": []},
        {"stop_token_ids": [VOCAB - 1] * 16},
        {"logprobs": 20},
        {"n": 1},
        {"model": "fake"},
        {"create_max": None},
        {"create_max": MAX_CREDIT},
        {"create_priority": 2**31 - 1},
        {"create_priority": -(2**31)},
        {"create_on_disconnect": "cancel"},
        dict.fromkeys(
            ("model", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs", "n")
        ),
    ],
    ids=lambda body: ",".join(body)[:40],
)
async def test_values_at_the_bounds_are_served(codec: str, body: dict[str, Any]):
    async with serving() as served, served.raw(codec) as raw:
        await raw.create("s", "abc", max_tokens=4, **body)
        assert (await raw.ended()).text == "abca"


async def test_a_socket_that_breaks_the_websocket_protocol_ends_alone():
    async with beside_a_live_stream("json") as (served, _), served.raw() as raw:
        raw.socket._writer.transport.write(b"\xff\xff garbage that is no frame")
        assert (await raw.closed()).code == aiohttp.WSCloseCode.PROTOCOL_ERROR


async def test_half_a_million_empty_parts_of_a_message_fill_nothing_and_keep_nobody_waiting():
    empty = frame(CONTINUATION, fin=False) * 10_000
    async with beside_a_live_stream("json") as (served, _), served.raw() as raw:
        process = psutil.Process()
        before = process.memory_info().rss
        transport = raw.socket._writer.transport
        transport.write(frame(TEXT, fin=False))
        for _ in range(50):
            transport.write(empty)
            async with served.http.get(f"{served.base}/health") as answer:  # others are served meanwhile
                assert answer.status == 200
        transport.write(frame(CONTINUATION, json_ping(40)))
        await raw.wait_for_type("pong")  # and all of it has been read
        assert process.memory_info().rss - before < 16 << 20

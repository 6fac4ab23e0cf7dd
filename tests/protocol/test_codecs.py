"""Every message survives both codecs, and both say the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv.protocol import messages as m
from streamkv.protocol.bodies import validation_error

CODECS = list(m.CODECS.values())
TEXT = st.text(max_size=20)
COUNT = st.integers(0, 2**53)
SECONDS = st.floats(0, 1e9, allow_nan=False)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
STATES = ["queued", "prefill", "decode", "stalled", "preempted"]
LOGPROBS = st.none() | st.lists(st.fixed_dictionaries({"chosen": NUMBER, "top": st.lists(st.tuples(COUNT, NUMBER).map(list))}))

SERVER = st.one_of(
    st.builds(
        m.Welcome,
        session=TEXT,
        epoch=TEXT,
        server=TEXT,
        models=st.lists(TEXT),
        limits=st.builds(m.Limits, streams=COUNT, queue=COUNT, frame=COUNT, hello_s=SECONDS, window=COUNT, ring=COUNT),
        heartbeat_s=SECONDS,
        grace_s=SECONDS,
        resume_s=SECONDS,
        resumed=st.booleans(),
    ),
    st.builds(m.Accepted, id=TEXT, rid=TEXT, prompt_tokens=st.none() | COUNT),
    st.builds(m.Status, id=TEXT, state=st.sampled_from(STATES), cached=st.none() | COUNT),
    st.builds(m.Resumed, id=TEXT, from_=COUNT, state=st.sampled_from([*STATES, "cancelling", "done"])),
    st.builds(m.Prompt, id=TEXT, o=COUNT, lp=LOGPROBS.map(lambda lp: lp or [])),
    st.builds(
        m.Delta, id=TEXT, o=COUNT, n=COUNT, x=TEXT, k=st.sampled_from(["text", "reasoning", "tool", "refusal"]), lp=LOGPROBS
    ),
    st.builds(
        m.Done,
        id=TEXT,
        o=COUNT,
        finish_reason=st.sampled_from(["stop", "length", "tool_calls", "content_filter", "cancelled", "error"]),
        usage=st.builds(m.Usage, prompt=COUNT, completion=COUNT, cached=COUNT),
        timings=st.builds(m.Timings, queue=SECONDS, prefill=SECONDS, ttft=SECONDS, decode=SECONDS),
        embedding=st.none() | st.lists(NUMBER, min_size=1),
        score=st.none() | st.builds(m.Score, logprob=NUMBER, tokens=COUNT, perplexity=st.none() | NUMBER),
    ),
    st.builds(
        m.Error,
        code=TEXT,
        message=TEXT,
        id=st.none() | TEXT,
        param=st.none() | TEXT,
        retryable=st.booleans(),
        retry_after_ms=st.none() | COUNT,
    ),
    st.builds(m.Pong, ts=NUMBER, now=NUMBER),
    st.builds(m.Drain, deadline_ms=COUNT, reason=TEXT),
)
CLIENT = st.one_of(
    st.builds(
        m.Hello,
        token=st.none() | TEXT,
        session=st.none() | TEXT,
        epoch=st.none() | TEXT,
        client=st.none() | TEXT,
        caps=st.none() | st.lists(TEXT),
    ),
    st.builds(m.Credit, id=TEXT, max=COUNT, ack=COUNT),
    st.builds(m.Cancel, id=TEXT),
    st.builds(m.Resume, id=TEXT, epoch=st.none() | TEXT, from_=COUNT, max=st.none() | COUNT),
    st.builds(
        m.Fork,
        from_=TEXT,
        id=st.none() | TEXT,
        ids=st.none() | st.lists(TEXT),
        at=st.none() | COUNT,
        max=st.none() | COUNT,
        on_disconnect=st.sampled_from(["grace", "cancel"]),
        priority=st.integers(-(2**31), 2**31),
        traceparent=st.none() | TEXT,
    ),
    st.builds(m.Ping, ts=NUMBER),
    st.builds(m.Bye, cancel=st.booleans()),
)


@pytest.mark.smoke
@settings(max_examples=150)
@given(message=SERVER)
def test_what_the_server_says_survives_both_codecs(message: m.ServerMessage):
    plain = []
    for codec in CODECS:
        data = codec.encode(message)
        assert codec.decode_server(data) == message
        plain.append(codec.decode_any(data))
    assert plain[0] == plain[1]
    assert plain[0]["t"] == message.__struct_config__.tag


@settings(max_examples=100)
@given(message=CLIENT)
def test_what_a_client_says_survives_both_codecs(message: m.ClientMessage):
    for codec in CODECS:
        assert codec.decode_client(codec.encode(message)) == message


@settings(max_examples=50)
@given(
    body=st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | NUMBER | TEXT | st.lists(TEXT)),
    ids=st.none() | st.lists(TEXT),
    priority=st.integers(-(2**31), 2**31),
)
def test_a_body_stays_as_it_was_written(body: dict[str, Any], ids: list[str] | None, priority: int):
    for codec in CODECS:
        raw = codec.encode(body)
        message = m.Create("chat", msgspec.Raw(raw), ids=ids, priority=priority)
        again = codec.decode_client(codec.encode(message))
        assert bytes(again.body) == raw
        assert (again.api, again.ids, again.priority) == ("chat", ids, priority)


def test_every_message_is_tried():
    tried = {strategy.wrapped_strategy.target for strategy in (*SERVER.original_strategies, *CLIENT.original_strategies)}
    assert tried | {m.Create} == {*m.ServerMessage.__args__, *m.ClientMessage.__args__}


def test_types_and_subprotocols_are_named_once():
    tags = [kind.__struct_config__.tag for kind in (*m.ServerMessage.__args__, *m.ClientMessage.__args__)]
    assert len(tags) == len(set(tags))
    assert m.SUBPROTOCOLS == ("streamkv.v1.json", "streamkv.v1.msgpack")


class _Inner(msgspec.Struct):
    deep: int


class _Outer(msgspec.Struct):
    one: int
    many: list[_Inner] = []


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"one": "x"}', "one"),
        (b'{"many": []}', "one"),
        (b'{"one": 1, "many": {}}', "many"),
        (b'{"one": 1, "many": [{"deep": 1}, {"deep": null}]}', "many[1].deep"),
        (b'{"one": 1, "many": [{}]}', "many[0].deep"),
        (b"[]", None),
        (b"{", None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "body"])
def test_an_error_names_the_path_of_the_field(data: bytes, param: str | None, prefix: str):
    with pytest.raises(msgspec.DecodeError) as caught:
        msgspec.json.decode(data, type=_Outer)
    error = validation_error(caught.value, prefix)
    assert error.param == (".".join(part for part in (prefix, param) if part) or None)
    assert "`" not in error.message
    assert "$" not in error.message


def test_an_error_does_not_send_back_what_was_sent():
    with pytest.raises(msgspec.DecodeError) as caught:
        m.CODECS["streamkv.v1.json"].decode_client(b'{"t":"' + b"x" * 10_000 + b'"}')
    assert len(validation_error(caught.value).message) <= 200

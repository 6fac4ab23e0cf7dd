"""From bytes to messages, or to the reason why they are none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.protocol import messages as m
from streamkv.protocol.actions import Close
from streamkv.protocol.frames import Malformed, read_hello, read_message

JSON, MSGPACK = m.CODECS["streamkv.v1.json"], m.CODECS["streamkv.v1.msgpack"]


def is_utf8(data: bytes) -> bool:
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


@given(st.binary(max_size=12) | st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_text_that_is_no_utf8_is_seen_wherever_it_is(part: bytes):
    frame = b'{"t":"ping","ts":1,"unknown":"' + part.replace(b'"', b"").replace(b"\\", b"") + b'"}'
    for data in (frame, part):
        read = read_message(JSON, data, is_text=True)
        assert (isinstance(read, Close) and read.code == 1007) == (not is_utf8(data))


@given(st.binary(max_size=12))
def test_binary_frames_need_not_be_utf8(data: bytes):
    assert not isinstance(read_message(MSGPACK, data, is_text=False), Close)


@pytest.mark.parametrize(("codec", "is_text"), [(JSON, False), (MSGPACK, True)])
def test_the_kind_of_a_frame_is_the_protocols(codec: m.Codec, is_text: bool):
    read = read_message(codec, codec.encode({"t": "ping"}), is_text=is_text)
    assert isinstance(read, Close)
    assert read.code == 1003


@pytest.mark.parametrize(
    ("message", "param", "ids"),
    [
        ({"t": "create", "id": "a", "api": 5, "body": {}}, "api", ("a",)),
        ({"t": "fork", "ids": ["a", "b", "a"], "from": "x", "at": "y"}, "at", ("a", "b")),
        ({"t": "create", "id": "a b", "api": 5}, "api", ()),
        ({"t": "create", "id": "a", "ids": ["b"], "api": 5}, "api", ()),
        ({"t": "create", "ids": ["a"] * 17, "api": 5}, "api", ()),
        ({"t": "create", "ids": [], "api": 5}, "api", ()),
        ({"t": "credit", "id": "a", "max": "x"}, "max", ()),
    ],
)
def test_what_is_malformed_names_its_field_and_the_streams_that_will_not_be(message: Any, param: str, ids: tuple[str, ...]):
    for codec in (JSON, MSGPACK):
        read = read_message(codec, codec.encode(message), is_text=codec.text)
        assert isinstance(read, Malformed)
        assert (read.code, read.param, read.ids) == ("invalid_request", param, ids)


@pytest.mark.parametrize("message", [{"t": "ping"}, {"t": "nothing"}, {"t": "hello", "token": 5}, 5, None])
def test_only_hello_opens(message: Any):
    for codec in (JSON, MSGPACK):
        read = read_hello(codec, codec.encode(message), is_text=codec.text)
        assert isinstance(read, Close)
        assert (read.code, "hello" in read.reason) == (4400, True)

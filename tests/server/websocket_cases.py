"""Frames right and wrong under RFC 6455, after Autobahn's sections 1 to 7, as bytes for a socket that has said hello."""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

__all__ = ["CASES", "Case", "Heard", "talk"]

Codec = Literal["json", "msgpack"]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True, length: int | None = None
) -> bytes:
    """One client frame, right or wrong; `length`: what its header says."""
    size = len(payload) if length is None else length
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", first, bit | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if not mask:
        return head + payload
    key = b"\x11\x22\x33\x44"
    repeated = key * (len(payload) // 4 + 1)
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(repeated[: len(payload)], "big")
    return head + key + masked.to_bytes(len(payload), "big")


def parts(opcode: int, *pieces: bytes) -> bytes:
    """One message in several frames."""
    opcodes = [opcode, *[CONTINUATION] * (len(pieces) - 1)]
    return b"".join(frame(kind, piece, fin=piece is pieces[-1]) for kind, piece in zip(opcodes, pieces, strict=True))


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


def json_ping(size: int | None = None, inside: bytes = b"") -> bytes:
    """A message of so many bytes, with `inside` in a field that the server does not know."""
    message = b'{"t":"ping","ts":1,"unknown":"' + inside + b'"}'
    return message if size is None else message + b" " * (size - len(message))


def msgpack_ping(size: int) -> bytes:
    """As above; the filling is binary."""
    for filling in range(size, 0, -1):
        message = msgspec.msgpack.encode({"t": "ping", "ts": 1.0, "u": b"\xff" * filling})
        if len(message) == size:
            return message
    raise AssertionError(f"no message has {size} bytes")


@dataclass(frozen=True)
class Case:
    """Bytes after hello, and what may come of them.

    Attributes:
        wanted: a close code, "empty" for a close without one, or "alive" for the answer to the message in them.
        pongs: payloads of the WebSocket pongs before that.
        known: what aiohttp does instead.
    """

    data: bytes
    wanted: tuple[int | str, ...]
    pongs: tuple[bytes, ...] = ()
    known: int | str | None = None
    codec: Codec = "json"


_ALIVE, _ERROR, _UTF8 = ("alive",), (1002,), (1007,)
_P = json_ping()

_LENGTHS: dict[str, Case] = {
    **{f"1 text of {size}": Case(frame(TEXT, json_ping(size)), _ALIVE) for size in (125, 126, 127, 128, 65535, 65536, 1 << 20)},
    **{
        f"1 binary of {size}": Case(frame(BINARY, msgpack_ping(size)), _ALIVE, codec="msgpack")
        for size in (125, 126, 127, 128, 65535, 65536, 1 << 20)
    },
    "1 empty text": Case(frame(TEXT) + frame(TEXT, _P), _ALIVE),
    "1 empty binary": Case(frame(BINARY) + frame(BINARY, msgpack_ping(50)), _ALIVE, codec="msgpack"),
    "1 text of 1 MiB and a byte": Case(frame(TEXT, json_ping((1 << 20) + 1)), (1009,)),
    "1 length longer than allowed": Case(frame(TEXT, b"x" * 100, length=1 << 40), (1009,)),
    "1 longest length with its top bit": Case(frame(TEXT, b"x" * 100, length=(1 << 63) + 5), (1002, 1009)),
    "1 binary on JSON": Case(frame(BINARY, _P), (1003,)),
    "1 text on MessagePack": Case(frame(TEXT, _P), (1003,), codec="msgpack"),
    "1 not masked": Case(frame(TEXT, _P, mask=False), _ERROR, known="alive"),
}
_PINGS: dict[str, Case] = {
    **{
        f"2 ping of {len(payload)}": Case(frame(PING, payload) + frame(TEXT, _P), _ALIVE, (payload,))
        for payload in (b"", b"hello", b"\x00\xff\xfe\xfd", b"x" * 125)
    },
    "2 ping of 126": Case(frame(PING, b"x" * 126), _ERROR),
    "2 pong nobody asked for": Case(frame(PONG) + frame(PONG, b"x") + frame(TEXT, _P), _ALIVE),
    "2 pong, then ping": Case(frame(PONG, b"x") + frame(PING, b"y") + frame(TEXT, _P), _ALIVE, (b"y",)),
    "2 ten pings": Case(
        b"".join(frame(PING, b"%d" % n) for n in range(10)) + frame(TEXT, _P), _ALIVE, tuple(b"%d" % n for n in range(10))
    ),
}
_BITS: dict[str, Case] = {
    **{f"3 text with RSV {rsv}": Case(frame(TEXT, _P, rsv=rsv), _ERROR) for rsv in range(1, 8)},
    **{f"3 ping with RSV {rsv}": Case(frame(PING, b"x", rsv=rsv), _ERROR) for rsv in range(1, 8)},
    **{f"3 close with RSV {rsv}": Case(frame(CLOSE, b"\x03\xe8", rsv=rsv), _ERROR) for rsv in range(1, 8)},
    **{f"4 opcode {opcode}": Case(frame(opcode), _ERROR) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    **{f"4 opcode {opcode} with payload": Case(frame(opcode, b"x"), _ERROR) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
}
_FRAGMENTS: dict[str, Case] = {
    "5 two parts": Case(parts(TEXT, _P[:5], _P[5:]), _ALIVE),
    "5 three parts, one of them empty": Case(parts(TEXT, _P[:5], b"", _P[5:]), _ALIVE),
    "5 first part empty": Case(parts(TEXT, b"", _P), _ALIVE),
    "5 last part empty": Case(parts(TEXT, _P, b""), _ALIVE),
    "5 parts of one byte": Case(parts(TEXT, *[_P[at : at + 1] for at in range(len(_P))]), _ALIVE),
    "5 binary in parts": Case(
        parts(BINARY, msgpack_ping(90)[:7], msgpack_ping(90)[7:50], msgpack_ping(90)[50:]), _ALIVE, codec="msgpack"
    ),
    "5 ping between parts": Case(
        frame(TEXT, _P[:5], fin=False) + frame(PING, b"x") + frame(CONTINUATION, _P[5:]), _ALIVE, (b"x",)
    ),
    "5 pings between all parts": Case(
        frame(TEXT, _P[:5], fin=False)
        + frame(PING, b"1")
        + frame(CONTINUATION, _P[5:9], fin=False)
        + frame(PING, b"2")
        + frame(CONTINUATION, _P[9:]),
        _ALIVE,
        (b"1", b"2"),
    ),
    "5 pong between parts": Case(frame(TEXT, _P[:5], fin=False) + frame(PONG, b"x") + frame(CONTINUATION, _P[5:]), _ALIVE),
    "5 close between parts": Case(frame(TEXT, _P[:5], fin=False) + closing(1000), (1000,)),
    "5 ping in parts": Case(frame(PING, b"x", fin=False) + frame(CONTINUATION, b"y"), _ERROR),
    "5 pong in parts": Case(frame(PONG, b"x", fin=False) + frame(CONTINUATION, b"y"), _ERROR),
    "5 close in parts": Case(frame(CLOSE, b"\x03\xe8", fin=False), _ERROR),
    "5 continuation of nothing": Case(frame(CONTINUATION, _P), _ERROR),
    "5 continuation of nothing, unfinished": Case(frame(CONTINUATION, b"x", fin=False), _ERROR),
    "5 continuation after the end": Case(parts(TEXT, _P[:5], _P[5:]) + frame(CONTINUATION, b"x"), ("alive", 1002)),
    "5 text inside text": Case(frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), _ERROR),
    "5 binary inside text": Case(frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), _ERROR),
    "5 parts beyond 1 MiB": Case(parts(TEXT, *[b" " * (1 << 19)] * 2, b" "), (1009,)),
}

VALID_UTF8: Final = (
    "κόσμε",
    "Hello-µ@ßöäüàá-UTF-8!!",
    "€",
    "\x7f\x80\u07ff\u0800\uffff",
    "\U00010000\U0010ffff",
    "\ufdd0\ufffe\ufffd",
)
INVALID_UTF8: Final = (
    b"\x80",  # a continuation that continues nothing
    b"\xbf\x80",
    b"\xc3",  # unfinished
    b"\xe2\x82",
    b"\xf0\x90\x80",
    b"\xc0 \xc1 ",
    b"\xfe",  # no byte of UTF-8
    b"\xff",
    b"\xc0\xaf",  # more bytes than needed
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xf8\x88\x80\x80\x80",  # sequences of five and six
    b"\xfc\x84\x80\x80\x80\x80",
    b"\xf4\x90\x80\x80",  # beyond U+10FFFF
    b"\xed\xa0\x80",  # surrogates
    b"\xed\xbf\xbf",
    b"\xed\xa0\x80\xed\xb0\x80",
    "κόσμε".encode() + b"\xed\xa0\x80edited",
)


def _cut(inside: bytes) -> bytes:
    """A message whose text is cut between all its bytes."""
    before, after = b'{"t":"ping","ts":1,"unknown":"', b'"}'
    return parts(TEXT, before, *[inside[at : at + 1] for at in range(len(inside))], after)


_UTF_8: dict[str, Case] = {
    **{f"6 {text!a}": Case(frame(TEXT, json_ping(inside=text.encode())), _ALIVE) for text in VALID_UTF8 if text.isprintable()},
    **{f"6 {text!a} cut": Case(_cut(text.encode()), _ALIVE) for text in VALID_UTF8},
    **{f"6 {text!r}": Case(frame(TEXT, json_ping(inside=text)), _UTF8) for text in INVALID_UTF8},
    **{f"6 {text!r} cut": Case(_cut(text), _UTF8) for text in INVALID_UTF8},
    "6 text ends within a character": Case(frame(TEXT, "€".encode()[:2]), _UTF8),
    "6 binary may be anything": Case(frame(BINARY, msgpack_ping(60)), _ALIVE, codec="msgpack"),
}
_CLOSES: dict[str, Case] = {
    "7 close without a code": Case(frame(CLOSE), (1000, "empty")),
    "7 close of one byte": Case(frame(CLOSE, b"\x03"), _ERROR),
    "7 close with a reason": Case(closing(1000, b"bye"), (1000,)),
    "7 close with the longest reason": Case(closing(1000, b"x" * 123), (1000,)),
    "7 close with too long a reason": Case(closing(1000, b"x" * 124), _ERROR),
    "7 close with a reason that is no UTF-8": Case(closing(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80"), (1002, 1007)),
    "7 two closes": Case(closing(1000) + closing(1000), (1000,)),
    "7 ping after close": Case(closing(1000) + frame(PING, b"x"), (1000,)),
    "7 text after close": Case(closing(1000) + frame(TEXT, _P), (1000,)),
    **{
        f"7 close {code}": Case(closing(code), (code, 1000))
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
    },
    **{f"7 close {code}": Case(closing(code), _ERROR) for code in (0, 999, 1004, 1005, 1016, 1100, 2000, 2999)},
    "7 close 1006": Case(closing(1006), _ERROR, known=1000),
    "7 close 5000": Case(closing(5000), (1000, 1002, 5000)),  # the RFC says nothing of these
    "7 close 65535": Case(closing(65535), (1000, 1002, 65535)),
}
CASES: Final[dict[str, Case]] = _LENGTHS | _PINGS | _BITS | _FRAGMENTS | _UTF_8 | _CLOSES


@dataclass(frozen=True)
class Heard:
    """What the server has said to a case: its last word, and the WebSocket pongs before that."""

    last: int | str
    pongs: tuple[bytes, ...]


_TURNS: Final = 4
"""Of the event loop, in which a server on it reads a piece, answers, and is heard: nothing more is written to a closed socket."""


async def talk(port: int, case: Case, *, piece: int | None = None, deadline_s: float = 5.0) -> Heard:
    """Connect, say hello and these bytes, the latter in pieces if wanted; "hang" if nothing comes of it in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        "GET /v1/stream HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        f"Sec-WebSocket-Protocol: streamkv.v1.{case.codec}",
    ]
    hello = {"t": "hello"}
    greeting = frame(TEXT, msgspec.json.encode(hello)) if case.codec == "json" else frame(BINARY, msgspec.msgpack.encode(hello))
    pongs: list[bytes] = []
    try:
        async with asyncio.timeout(deadline_s):
            writer.write("\r\n".join([*lines, "", ""]).encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(greeting)
            listening = asyncio.create_task(_listen(reader, case.codec, pongs))
            step = piece or len(case.data)
            for at in range(0, len(case.data), step):
                writer.write(case.data[at : at + step])
                for _ in range(_TURNS):
                    await asyncio.sleep(0)
                if listening.done():
                    break
            return Heard(await listening, tuple(pongs))
    except TimeoutError:
        return Heard("hang", tuple(pongs))
    except (asyncio.IncompleteReadError, ConnectionError):
        return Heard("dropped", tuple(pongs))
    finally:
        writer.transport.abort()


async def _listen(reader: asyncio.StreamReader, codec: Codec, pongs: list[bytes]) -> int | str:
    decode = msgspec.json.decode if codec == "json" else msgspec.msgpack.decode
    while True:
        first, size = await reader.readexactly(2)
        assert first & 0xF0 == 0x80, "a server's frame is whole, and without reserved bits"
        assert size < 128, "a server does not mask"
        if size >= 126:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        payload = await reader.readexactly(size)
        match first & 15:
            case 8:
                return int.from_bytes(payload[:2], "big") if payload else "empty"
            case 10:
                pongs.append(payload)
            case kind:
                assert kind == (TEXT if codec == "json" else BINARY)
                if decode(payload)["t"] == "pong":
                    return "alive"

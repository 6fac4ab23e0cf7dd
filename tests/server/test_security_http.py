"""What is not quite HTTP, too much of it, or too slow: on real sockets, one test for each mistake that others have made."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from shutil import which
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from streamkv.errors import ConfigError
from streamkv.server.app import Server
from streamkv.server.config import HttpLimits
from streamkv.server.listener import Connections, tls_context
from streamkv.server.routes import Access, Route
from tests.server.serving import DEADLINE_S, Serving, eventually, serving
from tests.server.wire import Answer, ask, exchange, head, keyed

MIB = 1 << 20
JSON = ("Content-Type", "application/json")


@asynccontextmanager
async def bounded(served: Serving, mib: int = 64) -> AsyncIterator[None]:
    """Inside, others are served meanwhile and the memory does not grow by more than this; afterwards nothing is left."""
    gc.collect()
    process = psutil.Process()
    before, worst, laps = process.memory_info().rss, 0, 0

    async def others() -> None:
        nonlocal worst, laps
        while True:
            assert (await ask(served, "GET", "/health")).status == 200
            worst = max(worst, process.memory_info().rss - before)
            laps += 1
            await asyncio.sleep(0.005)

    task = asyncio.create_task(others())
    try:
        yield
        seen = laps
        await eventually(lambda: laps > seen or task.done())
    finally:
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError), result
    assert worst < mib * MIB, f"{worst / MIB:.0f} MiB more"


async def send(served: Serving, *parts: bytes) -> Answer:
    return Answer.parse(await exchange(served.server.port, *parts))


def post(served: Serving, *headers: tuple[str, str], close: bool = True) -> bytes:
    return head("POST", "/v1/ws-tickets", served.server.port, JSON, *headers, close=close)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("32 KiB header", b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 32768 + b"\r\n\r\n"),
        ("32 MiB header", b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (32 * MIB)),
        ("1,000 headers", b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(1000)) + b"\r\n"),
        ("long line", b"GET /" + b"a" * 32768 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("bare LF", b"GET /health HTTP/1.1\nHost: x\n\n"),
        ("bare LF in the middle", b"GET /health HTTP/1.1\r\nHost: x\nX: y\r\n\r\n"),
        ("bare CR", b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n"),
        ("NUL", b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n"),
        ("blank before the colon", b"GET /health HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n"),
        ("no name", b"GET /health HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n"),
        ("no version", b"GET /health\r\nHost: x\r\n\r\n"),
        ("version 3", b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n"),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
        ("binary", bytes(range(256)) * 8 + b"\r\n\r\n"),
        ("a letter that is no ASCII in the name", b"GET /health HTTP/1.1\r\nHost: x\r\nX\xff: a\r\n\r\n"),
        ("two lengths", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
        (
            "length and chunks",
            b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        ("chunks that are none", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        ("chunked twice", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
        ("chunked first", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        ("negative length", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"),
        ("signed length", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}"),
        ("underscores in the length", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\n{}"),
        ("length of other digits", "POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: ２\r\n\r\n{}".encode()),
        ("two hosts", b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
        ("two types", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Type: c/d\r\n\r\n"),
        ("enormous length", b"POST /v1/ws-tickets HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_heads_that_http_does_not_allow_end_the_connection(what: str, data: bytes):
    async with serving() as served, bounded(served):
        answer = await send(served, data)
        assert answer.status in (0, 400), what
        if answer.status:
            sentences = ("this is not a request that HTTP allows, or it is too large", "send HTTP/1.1")
            assert answer.json["error"]["message"] in sentences
            assert answer.header("Server") == "streamkv"


async def test_what_follows_a_refused_request_is_not_taken_for_another_one():
    """Smuggling: the second request would be served if the first one's body were counted differently."""
    async with serving() as served:
        inner = head("GET", "/health", served.server.port)
        for first in (
            post(served, ("Content-Length", "3"), ("Transfer-Encoding", "chunked"), close=False) + b"0\r\n\r\n",
            post(served, ("Content-Length", "0"), ("Content-Length", str(len(inner))), close=False),
            post(served, ("Transfer-Encoding", "\x0bchunked"), close=False) + b"0\r\n\r\n",
        ):
            said = await exchange(served.server.port, first + inner)
            assert said.count(b"HTTP/1.1 ") <= 1, said
            assert b'"status": "ok"' not in said


async def test_a_header_that_comes_in_pieces_has_the_same_bound():
    async with serving() as served, bounded(served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        sent = 0
        reading = asyncio.create_task(reader.read())
        while not reading.done() and sent < MIB:
            writer.write(b"a" * 1000)
            sent += 1000
            with suppress(ConnectionError):
                await writer.drain()
            await ask(served, "GET", "/health")  # the server has read what was written
        said = (await asyncio.gather(reading, return_exceptions=True))[0]
        assert isinstance(said, ConnectionError) or said[9:12] in (b"", b"400")
        assert sent < 2 * 8190 + 1000
        writer.transport.abort()


async def test_cookies_that_are_none_are_neither_read_nor_logged(caplog: pytest.LogCaptureFixture):
    """CVE-2025-69230: a warning for each of them."""
    cookies = "; ".join(f'a@b[{index}]="' for index in range(500))
    with capture_logs() as logs:
        async with serving() as served:
            assert (await ask(served, "GET", "/health", {"Cookie": cookies})).status == 200
    assert not caplog.records
    assert not logs


# -- slow ones ---------------------------------------------------------------------------------------------------------


def test_who_does_not_send_a_head_is_ended_in_time_and_in_order():
    class Handler:
        def __init__(self) -> None:
            self.transport: Any = self
            self.aborted = False

        def abort(self) -> None:
            self.aborted = True

    now = 0.0
    connections = Connections(10.0, lambda: now)
    handlers = [Handler() for _ in range(4)]
    for at, handler in zip((0.0, 1.0, 2.0, 9.0), handlers, strict=True):
        now = at
        connections.made(handler)  # type: ignore[arg-type]  # all that is used of one
    connections.spoke(handlers[1])  # type: ignore[arg-type]  # as above
    now = 11.9
    connections.end_slow()
    assert [handler.aborted for handler in handlers] == [True, False, False, False]
    handlers[2].transport = None  # gone by itself
    now = 30.0
    connections.end_slow()
    assert [handler.aborted for handler in handlers] == [True, False, False, True]
    assert len(connections) == 0


async def test_a_head_a_byte_at_a_time_is_cut_off_and_others_are_not():
    """Slowloris."""
    limits = HttpLimits(head_s=0.3)
    async with serving(http=limits) as served, served.raw() as websocket:
        readers = []
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
            readers.append((reader, writer))
        keeping, keeper = await asyncio.open_connection("127.0.0.1", served.server.port)
        keeper.write(head("GET", "/health", served.server.port, close=False))
        assert b"200" in await keeping.readline()

        async def drip(writer: asyncio.StreamWriter) -> None:
            for byte in head("GET", "/health", served.server.port) * 100:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = [asyncio.create_task(drip(writer)) for _, writer in readers]
        async with asyncio.timeout(DEADLINE_S):
            for reader, _ in readers:
                with suppress(ConnectionError):
                    assert await reader.read() == b""
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)
        assert len(served.server._listener.connections) == 0
        # Those who have spoken may be silent, as long as keep-alive allows, and WebSockets for ever.
        keeper.write(head("GET", "/health", served.server.port, close=False))
        assert b'{"status": "ok"}' in await keeping.readuntil(b"}")
        assert await websocket.synced() == []
        for _, writer in [*readers, (keeping, keeper)]:
            writer.close()


async def test_a_silent_connection_is_ended_between_requests_as_well():
    async with serving(http=HttpLimits(keepalive_s=0.2)) as served:
        said = await exchange(served.server.port, head("GET", "/health", served.server.port, close=False) + b"GET /hea")
        assert said.count(b"HTTP/1.1 200") == 1


async def test_a_slow_body_is_given_up_on():
    async with serving(http=HttpLimits(body_s=0.1)) as served:
        for form in (("Content-Length", "100"), ("Transfer-Encoding", "chunked")):
            answer = await send(served, post(served, form, close=False) + b"1\r\n")
            assert (answer.status, answer.code) == (408, "timeout")


async def test_who_leaves_in_the_middle_of_a_body_leaves_nothing_behind():
    async with serving() as served:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
            writer.write(post(served, ("Content-Length", "1000"), close=False) + b"{")
            await writer.drain()
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
            writer.transport.abort()
        await eventually(lambda: len(served.server._listener.connections) == 0)
        assert (await ask(served, "GET", "/health")).status == 200


# -- large ones --------------------------------------------------------------------------------------------------------


async def test_a_large_body_is_refused_before_it_is_read():
    async with serving() as served, bounded(served):
        answer = await send(served, post(served, ("Content-Length", str(1 << 40)), close=False) + b"x" * (2 * MIB))
        assert (answer.status, answer.code) == (413, "too_large")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        answer = await send(served, post(served, ("Transfer-Encoding", "chunked"), close=False), *[chunk] * 32)
        assert answer.status in (0, 413)  # the connection may be gone before all of it has been sent


async def test_a_body_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked():
    """CVE-2025-69223."""
    bomb = gzip.compress(bytes(256 * MIB), 9)
    assert len(bomb) < MIB
    async with serving() as served, bounded(served):
        for encoding in ("gzip", "deflate"):
            answer = await send(served, post(served, ("Content-Encoding", encoding), ("Content-Length", str(len(bomb)))) + bomb)
            assert answer.status == 415


async def test_nothing_below_the_guard_unpacks_either(monkeypatch: pytest.MonkeyPatch):
    """The second lock: a handler that reads for itself gets what was sent."""

    async def size(request: web.Request) -> web.Response:
        return web.json_response(len(await request.read()))

    routes = Server.routes
    monkeypatch.setattr(Server, "routes", lambda self: [*routes(self), Route("POST", "/size", size, Access.PUBLIC)])
    packed = gzip.compress(bytes(100_000))
    async with serving() as served:
        answer = await ask(served, "POST", "/size", {"Content-Encoding": "gzip"}, packed)
        assert answer.json == len(packed)


async def test_many_tiny_chunks_cost_time_in_proportion():
    """CVE-2025-69229, CVE-2025-23310: each chunk's cost must not grow with their number."""
    async with serving(http=HttpLimits(body_s=DEADLINE_S)) as served, bounded(served):
        blank = b"1\r\n \r\n"
        parts = [blank * 10_000] * 20
        whole = b"2\r\n{}\r\n0\r\n\r\n"
        answer = await send(served, post(served, ("Transfer-Encoding", "chunked")), *parts, whole)
        assert answer.status == 200


async def test_ten_thousand_trailers_are_not_kept():
    """CVE-2026-22815."""
    async with serving() as served, bounded(served):
        trailers = b"".join(b"X-%d: %s\r\n" % (index, b"a" * 1000) for index in range(10_000))
        answer = await send(served, post(served, ("Transfer-Encoding", "chunked")) + b"2\r\n{}\r\n0\r\n", trailers, b"\r\n")
        assert answer.status in (0, 400)


async def test_ten_thousand_pipelined_requests_are_answered_in_turn():
    """Backlog: the queue of one connection is bounded, and others get their turn."""
    async with serving() as served, bounded(served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        one = head("GET", "/health", served.server.port, close=False)

        async def write() -> None:
            for _ in range(100):
                writer.write(one * 100)
                await writer.drain()
            writer.write(head("GET", "/ready", served.server.port))

        writing = asyncio.create_task(write())
        async with asyncio.timeout(DEADLINE_S):
            said = await reader.read()
        await writing
        writer.close()
        assert said.count(b'{"status": "ok"}') == 10_000
        assert said.rstrip().endswith(b'"model": "fake"}')


async def test_ten_thousand_pipelined_requests_of_somebody_who_does_not_read_fill_nothing():
    async with serving() as served, bounded(served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port, limit=1024)
        writer.transport.pause_reading()
        for _ in range(100):
            writer.write(head("GET", "/health", served.server.port, close=False) * 100)
        await asyncio.sleep(0.2)
        writer.transport.abort()
        del reader


async def test_an_open_upgrade_that_is_refused_does_not_let_a_second_request_through(tmp_path: Path):
    """CVE-2026-69243: smuggling behind a refused upgrade."""
    async with keyed(tmp_path) as served:
        upgrade = head(
            "GET",
            "/v1/stream",
            served.server.port,
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Authorization", "Bearer x"),
            close=False,
        )
        said = await exchange(served.server.port, upgrade + head("GET", "/v1/kv/map", served.server.port))
        assert said.count(b"HTTP/1.1 401") == 2


# -- R-BIND ------------------------------------------------------------------------------------------------------------


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections(kind="inet")
    return {(entry.laddr.ip, entry.laddr.port) for entry in found if entry.status == psutil.CONN_LISTEN}


async def test_r_bind_every_listening_socket_is_a_configured_one(tmp_path: Path):
    """R-BIND."""
    before = listening()
    async with (
        keyed(tmp_path, admin_port=0) as served,
        served.raw(headers={"Authorization": "Bearer boss-key-0123456789"}, hello=False),
    ):
        opened = listening() - before
        assert opened == {("127.0.0.1", served.server.port), ("127.0.0.1", served.server.guard.admin_port)}
    assert listening() - before == set()


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if which("openssl") is None:
        pytest.skip("openssl is not installed: TLS IS NOT TESTED")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("a", "b"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
                *("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
            ],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    subprocess.run(
        ["openssl", "ec", "-in", "a.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "junk.pem").write_text("junk")
    return folder


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
async def test_tls_serves_both_dialects_and_nothing_below_1_2(certificates: Path):
    trusting = ssl.create_default_context(cafile=certificates / "a.pem")
    async with serving(tls_cert=certificates / "a.pem", tls_key=certificates / "a.key") as served:
        url = f"https://127.0.0.1:{served.server.port}"
        async with served.http.get(url + "/ready", ssl=trusting) as response:
            assert response.status == 200
        async with served.http.ws_connect(url + "/v1/stream", protocols=["streamkv.v1.json"], ssl=trusting) as raw:
            await raw.send_json({"t": "hello"})
            assert (await raw.receive_json())["t"] == "welcome"
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert await negotiated(served.server.port, version) == version.name.replace("_", ".")
        assert await negotiated(served.server.port, ssl.TLSVersion.TLSv1_1) is None
        assert (await ask(served, "GET", "/ready")).status == 0


async def negotiated(port: int, version: ssl.TLSVersion) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = version
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return None
    name = writer.get_extra_info("ssl_object").version()
    writer.close()
    return str(name)


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("none.pem", "a.key", r"cannot read .*none\.pem: No such file"),
        ("a.pem", "none.key", r"cannot read .*none\.key: No such file"),
        ("junk.pem", "a.key", "cannot use the TLS certificate"),
        ("a.pem", "junk.pem", "cannot use the TLS certificate"),
        ("a.pem", "b.key", "key values mismatch"),
        ("a.pem", "locked.key", "encrypted"),
    ],
)
def test_tls_files_of_no_use_are_named_in_one_sentence(certificates: Path, certificate: str, key: str, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        tls_context(certificates / certificate, certificates / key)
    assert "\n" not in caught.value.message


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_handshake_that_never_comes_is_given_up_on(certificates: Path):
    async with serving(tls_cert=certificates / "a.pem", tls_key=certificates / "a.key", http=HttpLimits(head_s=0.3)) as served:
        assert await exchange(served.server.port, b"\x16\x03\x01") == b""


async def test_the_clients_of_the_tests_are_refused_by_a_certificate_they_do_not_know(certificates: Path):
    async with serving(tls_cert=certificates / "a.pem", tls_key=certificates / "a.key") as served:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await served.http.get(f"https://127.0.0.1:{served.server.port}/ready")

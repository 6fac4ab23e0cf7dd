"""`/v1/stream` under RFC 6455: right frames are answered, wrong ones end their connection with the right code and no other."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import aiohttp
import pytest

from tests.server import autobahn
from tests.server.serving import serving
from tests.server.websocket_cases import CASES, Case, talk

DEADLINE_S = 30.0
SECTIONS = sorted({name[0] for name in CASES})
SMALL = 2000
"""Bytes; what is larger is not sent in pieces of a few."""


def judge(case: Case, last: int | str, pongs: tuple[bytes, ...]) -> str | None:
    """What is wrong with the answer; what is known of aiohttp must be as it is known, or the list is to be changed."""
    wanted = case.wanted if case.known is None else (case.known,)
    if last not in wanted:
        return f"{last} and not {wanted}"
    return None if pongs == case.pongs else f"pongs {pongs} and not {case.pongs}"


@pytest.mark.parametrize("piece", [None, 1, 3])
@pytest.mark.parametrize("section", SECTIONS)
async def test_frames_right_and_wrong(section: str, piece: int | None):
    async with serving() as served, served.raw() as bystander:
        wrong: dict[str, str] = {}
        for name, case in CASES.items():
            if name[0] != section or (piece is not None and len(case.data) > SMALL):
                continue
            heard = await talk(served.server.port, case, piece=piece, deadline_s=DEADLINE_S)
            problem = judge(case, heard.last, heard.pongs)
            if problem is not None:
                wrong[name] = problem
        assert wrong == {}
        assert await bystander.synced() == []


def test_every_section_is_there():
    assert SECTIONS == ["1", "2", "3", "4", "5", "6", "7"]
    assert len(CASES) > 150
    assert {name for name, case in CASES.items() if case.known is not None} == {"1 not masked", "7 close 1006"}


async def test_what_autobahn_talks_to_is_the_servers_own_connection_and_says_what_it_is_told():
    async with (
        autobahn.echoing() as port,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"http://127.0.0.1:{port}/", compress=15) as socket,
    ):
        assert not socket.compress
        await socket.send_str("ä")
        assert (await socket.receive()).data == "ä"
        await socket.send_bytes(b"\xff" * 70_000)
        assert (await socket.receive()).data == b"\xff" * 70_000
        await socket.send_frame(b"\xff", aiohttp.WSMsgType.TEXT)
        closed = await socket.receive()
        assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, 1007)


@pytest.mark.skipif("STREAMKV_WSTEST" not in os.environ, reason="STREAMKV_WSTEST does not say how to start Autobahn's wstest")
async def test_autobahn(tmp_path: Path):
    cases = [f"{section}.*" for section in (1, 2, 3, 4, 5, 6, 7, 10)]
    judged = await autobahn.run(shlex.split(os.environ["STREAMKV_WSTEST"]), cases, tmp_path)
    assert len(judged) == 247
    assert autobahn.report(judged)

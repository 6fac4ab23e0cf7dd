"""`streamkv top`: what it shows of a picture, and the program in a terminal and in a pipe, against a real server."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from streamkv.cli.kv_picture import Picture, page
from tests.server.serving import serving
from tests.server.terminal import CTRL_C, terminal
from tests.server.wire import KEYS, bearer, keyed

BOUNDS, NONE = [0.1, 1.0], [0, 0, 0]


def message(kind: str = "snapshot", *, at: float = 10.0, runs: list[list[int]] | None = None, **fields: Any) -> dict[str, Any]:
    counts = {"free": 4, "cached": 2, "used": 2, "fenced": 0}
    common = {"at": at, "step": 9, "counts": counts, "unused_slots": 8, "requests": [], "runs": runs or []}
    return {"t": kind, "blocks": 8, "block_size": 16} | common | fields


def load(output: int, itl: list[int]) -> dict[str, Any]:
    histograms = {name: {"le": BOUNDS, "n": itl if name == "itl" else NONE} for name in ("ttft", "itl", "lag")}
    counts = {"waiting": 3, "running": 2, "stalled": 1, "preemptions": 5, "prompt_tokens": 0, "cached_tokens": 0}
    return counts | {"output_tokens": output} | histograms


def mine(number: int, blocks: int, output: int, **fields: Any) -> dict[str, Any]:
    return {"n": number, "id": f"r{number}", "blocks": blocks, "prompt": 20, "output": output, "stalled": False} | fields


RUNS = [[0, 2, 2, 1, 1, 16, -1], [2, 1, 2, 2, -1, -1, -1], [3, 2, 1, 0, -1, -1, -1], [5, 3, 0, 0, -1, -1, -1]]


def test_blocks_are_drawn_as_they_are():
    picture = Picture()
    picture.take(message(runs=RUNS, requests=[mine(1, 2, 4), {"n": 2, "blocks": 1}]))
    assert picture.kinds == ["yours"] * 2 + ["others"] + ["cached"] * 2 + ["free"] * 3
    lines = page(picture, "http://x", 80, 40, colour=False)
    assert "██▒░░···" in lines
    picture.take(message("delta", runs=[[0, 2, 0, 0, -1, -1, -1], [7, 1, 3, 0, -1, -1, -1]]))
    assert picture.kinds == ["free"] * 2 + ["others"] + ["cached"] * 2 + ["free"] * 2 + ["fenced"]


def test_two_blocks_share_a_character_in_colour():
    picture = Picture()
    picture.take(message(runs=RUNS, requests=[mine(1, 2, 4)]))
    (drawn,) = (line for line in page(picture, "http://x", 4, 40, colour=True) if "▀" in line)
    assert drawn == ("\x1b[38;5;71;48;5;24m▀\x1b[38;5;71;48;5;236m▀\x1b[38;5;244;48;5;236m▀\x1b[38;5;24;48;5;236m▀\x1b[0m")


def test_more_blocks_than_cells_are_merged():
    picture = Picture()
    picture.take(message(blocks=100_000, runs=[[0, 60_000, 1, 0, -1, -1, -1]]))
    for colour in (True, False):
        lines = page(picture, "http://x", 80, 24, colour=colour)
        assert len(lines) <= 24
        drawn = [line for line in lines if "▀" in line or "░" in line]
        assert 1 <= len(drawn) <= 16


def test_speeds_and_quantiles_are_those_of_the_last_seconds():
    picture = Picture()
    for second in range(31):
        picture.take(
            message("snapshot", at=float(second), load=load(second * 50, [0, second, 0]), requests=[mine(1, 2, second * 2)])
        )
    assert picture.rate("output_tokens") == pytest.approx(50)
    assert picture.speeds() == {1: pytest.approx(2)}
    assert len(picture._past) == 11
    lines = page(picture, "http://x", 80, 40, colour=False)
    assert any("50.0 tok/s" in line and "waiting 3" in line and "preemptions 5" in line for line in lines)
    assert any(line.startswith("ITL") and "p50 550.0 ms" in line for line in lines)
    assert any(line.startswith("TTFT") and "p50 -" in line for line in lines)


def test_tenants_and_the_largest_requests_are_listed():
    picture = Picture()
    requests = [mine(n, n, 3, tenant="acme" if n % 2 else "rival", stalled=n == 5) for n in range(1, 16)]
    picture.take(message(requests=requests, load=load(0, NONE)))
    lines = page(picture, "http://x", 100, 60, colour=False)
    assert [line.split()[:3] for line in lines if line.startswith(("acme", "rival"))] == [
        ["acme", "8", "64"],
        ["rival", "7", "56"],
    ]
    assert [line.split()[0] for line in lines if re.match(r"r\d", line)] == [f"r{n}" for n in range(15, 5, -1)]


def test_a_name_cannot_move_the_cursor():
    picture = Picture()
    picture.take(message(requests=[mine(1, 1, 1, id="\x1b[2Jevil\n", tenant="\x1b]0;x\x07")], load=load(0, NONE)))
    assert not any("\x1b" in line or "\n" in line for line in page(picture, "http://x", 100, 40, colour=False))


# -- the program ------------------------------------------------------------------------------------------------------


async def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "streamkv", "top", *arguments),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_once_in_a_pipe_is_one_page_of_plain_text():
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 3
        await raw.create("s", "abc", max_tokens=9)
        await raw.wait_for(lambda message: message.get("state") == "stalled")
        status, output, errors = await run("--url", served.base, "--once")
    assert (status, errors) == (0, "")
    assert "\x1b" not in output
    assert "KV 1/1024 blocks in use" in output
    assert re.search(r"running 1 +waiting 0 +stalled 1", output)
    assert re.search(r"(?m)^c\d+-0\.0 +1 +3 +3 +stalled$", output)


async def test_in_a_terminal_it_goes_on_until_ctrl_c_and_cleans_up():
    async with serving() as served, terminal("top", "--url", served.base) as top:
        await top.expect("0/1024 blocks in use")
        assert "\x1b[?1049h" in top.seen, "a page of its own"
        assert "▀" in (await top.expect("\x1b[J"))
        async with served.raw() as raw:
            served.engine.hold = 1
            await raw.create("s", "abc", max_tokens=9)
            await top.expect("KV 1/1024")
        top.type(CTRL_C)
        assert await top.exit_status() == 0
        assert top.seen.endswith("\x1b[?25h\x1b[?1049l"), "the terminal as it was"


async def test_a_tenant_sees_its_own_and_an_admin_sees_tenants(tmp_path: Path):
    async with keyed(tmp_path) as served, served.raw(headers=bearer("acme")) as raw:
        served.engine.hold = 1
        await raw.create("s", "abc", max_tokens=9)
        await raw.wait_for(lambda message: message.get("state") == "stalled")
        own, admins, others, nobodys = await asyncio.gather(
            run("--url", served.base, "--once", STREAMKV_API_KEY=KEYS["acme"]),
            run("--url", served.base, "--once", STREAMKV_ADMIN_KEY=KEYS["boss"]),
            run("--url", served.base, "--once", STREAMKV_API_KEY=KEYS["rival"]),
            run("--url", served.base, "--once"),
        )
    assert "requests 1 of yours, 1 in all" in own[1]
    assert "requests 0 of yours, 1 in all" in others[1]
    assert re.search(r"(?m)^acme +1 +1 ", admins[1])
    assert nobodys[0] == 1
    assert "answers 401; set STREAMKV_API_KEY" in nobodys[2]


async def test_no_server_is_said_in_one_line():
    status, output, errors = await run("--url", "http://127.0.0.1:1", "--once")
    assert (status, output) == (1, "")
    assert errors == "streamkv: cannot connect to ws://127.0.0.1:1/v1/kv/live: is the server running?\n"


async def test_a_server_that_ends_is_said():
    async with serving() as served:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "streamkv", "top", "--url", served.base),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        await process.stdout.readline()
        await served.server.drain("maintenance")
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (1, b"streamkv: the server has ended the connection\n")

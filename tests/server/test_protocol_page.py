"""docs/protocol.md has this conversation with a real server: `>` is sent, `<` must come, `…` is anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import aiohttp

from streamkv import errors
from streamkv.protocol import messages
from tests.server.serving import DEADLINE_S, serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
SOURCES = Path(errors.__file__).parent


def conversation() -> list[tuple[str, str]]:
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [(line[0], line[2:]) for block in blocks for line in block.splitlines()]


def expected(line: str) -> re.Pattern[str]:
    """The line as a pattern over compact JSON with sorted keys left in their order."""
    compact = line.replace(": ", ":").replace(", ", ",") if line.startswith("{") else line
    return re.compile(re.escape(compact).replace("…", ".*?"))


async def test_the_page_is_what_a_server_says() -> None:
    lines = conversation()
    assert len(lines) > 20
    async with serving() as running, running.http.ws_connect(running.url, protocols=["streamkv.v1.json"]) as socket:
        for direction, line in lines:
            if direction == ">":
                await socket.send_str(line)
                continue
            while True:
                frame = await socket.receive(DEADLINE_S)
                assert frame.type is aiohttp.WSMsgType.TEXT, (frame, line)
                said = json.loads(frame.data)
                if said.get("id") == "v2" or (said.get("id") in ("s1", "s2", "f1", "f2") and said["t"] != "accepted"):
                    continue  # the page shows of samples and forks only that they are accepted, and one of the two vectors
                break
            text = json.dumps(said, separators=(",", ":"), ensure_ascii=False)
            assert expected(line).fullmatch(text), f"the page says {line}\nthe server says {text}"


def test_every_message_is_on_the_page() -> None:
    page = PAGE.read_text()
    for message in (*messages.ClientMessage.__args__, *messages.ServerMessage.__args__):
        name = message.__struct_config__.tag
        assert re.search(rf"`{name}`|\"t\": \"{name}\"", page), name


def test_every_code_is_on_the_page() -> None:
    page = PAGE.read_text()
    source = "".join(path.read_text() for part in ("protocol", "server") for path in (SOURCES / part).glob("*.py"))
    raised = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.code for kind in raised if not issubclass(kind, errors.ConfigError)}
    codes |= set(re.findall(r'(?:notice|m\.Error|Malformed)\(\s*"([a-z_]+)"', source))
    assert {"unknown_type", "draining", "too_many_streams"} <= codes
    for code in codes:
        assert f"`{code}`" in page, code
    closes = set(re.findall(r"[cC]lose\((\d{4})", source))
    assert {"1008", "4400", "4401"} <= closes
    for close in closes:
        assert f"| {close} |" in page, close

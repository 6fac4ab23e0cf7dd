"""Autobahn's fuzzing client against the connections of `/v1/stream`: 517 cases of RFC 6455 and RFC 7692.

    pip2.7 install --target site autobahntestsuite && touch site/zope/__init__.py
    python -m tests.server.autobahn 'env PYTHONPATH=site python2.7 site/bin/wstest' [--cases '1.*,2.*'] [--out FOLDER]

Autobahn wants its frames back. So what stands here is the server's own socket and `Connection`, reader, writer and closing
handshake and all, with an echo in the place of the session. Exit status 1 if a case fails that is not one of `KNOWN`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from aiohttp import WSMsgType, web

from streamkv.observe.recorder import NullRecorder
from streamkv.protocol.frames import broken_text
from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.messages import CODECS
from streamkv.server.config import ServerConfig
from streamkv.server.connection import Connection, new_socket

AGENT: Final = "streamkv"
KNOWN: Final = {"7.9.5": "a close with code 1006 is answered with 1000 and not with 1002; aiohttp's own"}
CONFIG: Final = ServerConfig(limits=SessionLimits(hello_s=3600.0, frame=32 << 20))
"""The server's own limits but two: nobody says hello here, and section 9 sends up to 16 MiB."""
GOOD: Final = ("OK", "INFORMATIONAL", "NON-STRICT", "UNIMPLEMENTED")


class _NoSessions:
    """All that a connection wants of the store when nobody says hello."""

    def balance(self) -> None:
        pass


class EchoConnection(Connection):
    """A connection whose session says what it is told."""

    def __init__(self, request: web.Request) -> None:
        socket = new_socket(CONFIG.limits)
        codec = CODECS["streamkv.v1.json"]  # for nothing: frames are not read
        store: Any = _NoSessions()
        super().__init__("echo", socket, request, codec, store, lambda _: None, CONFIG, lambda: None, NullRecorder())
        self.socket = socket
        self._echoes: deque[tuple[bytes, WSMsgType]] = deque()

    def _receive(self, data: bytes, *, is_text: bool) -> None:
        broken = broken_text(data) if is_text else None
        if broken is not None:
            self.close(broken.code, broken.reason)
            return
        self._echoes.append((data, WSMsgType.TEXT if is_text else WSMsgType.BINARY))
        self.wake()

    async def _send_next(self) -> bool:
        if not self._echoes:
            return False
        async with asyncio.timeout(self._config.send_timeout_s):
            await self._socket.send_frame(*self._echoes.popleft())
        return True


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """Listen; the port."""

    async def handler(request: web.Request) -> web.StreamResponse:
        connection = EchoConnection(request)
        await connection.socket.prepare(request)
        await connection.run()
        return connection.socket

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]  # has been started
    finally:
        await runner.cleanup()


async def run(wstest: list[str], cases: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By case, what Autobahn says of it."""
    async with echoing() as port:
        spec = {
            "outdir": str(folder),
            "servers": [{"agent": AGENT, "url": f"ws://127.0.0.1:{port}/"}],
            "cases": cases,
            "exclude-cases": [],
            "exclude-agent-cases": {},
        }
        path = folder / "spec.json"
        path.write_text(json.dumps(spec))
        client = await asyncio.create_subprocess_exec(
            *wstest, "-m", "fuzzingclient", "-s", str(path), stdout=asyncio.subprocess.DEVNULL
        )
        assert await client.wait() == 0, "the fuzzing client has failed"
    judged: dict[str, dict[str, Any]] = json.loads((folder / "index.json").read_text())[AGENT]
    return judged


def report(judged: dict[str, dict[str, Any]]) -> bool:
    """Print a table by section; True if nothing has failed that is not known."""
    sections: dict[int, Counter[str]] = {}
    for case, found in judged.items():
        sections.setdefault(int(case.partition(".")[0]), Counter())[found["behavior"]] += 1
    names = sorted({name for counts in sections.values() for name in counts})
    print("| section | cases | " + " | ".join(name.lower() for name in names) + " |")
    print("|---|" + "---:|" * (1 + len(names)))
    for section, counts in sorted(sections.items()):
        print(f"| {section} | {counts.total()} | " + " | ".join(str(counts[name]) for name in names) + " |")
    others = {
        case: found for case, found in judged.items() if found["behavior"] not in GOOD or found["behaviorClose"] not in GOOD
    }
    for case, found in sorted(others.items()):
        print(f"{case}: {found['behavior']}, close {found['behaviorClose']}: {KNOWN.get(case, 'NOT KNOWN')}")
    return others.keys() <= KNOWN.keys()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wstest", help="how to start Autobahn's wstest")
    parser.add_argument("--cases", default="*", help="as Autobahn names them, with commas between")
    parser.add_argument("--out", type=Path, help="folder for Autobahn's own pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        judged = asyncio.run(run(shlex.split(arguments.wstest), arguments.cases.split(","), folder))
    sys.exit(0 if report(judged) else 1)


if __name__ == "__main__":
    main()

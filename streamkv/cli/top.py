"""`streamkv top`: a running server as it is now. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from streamkv.cli.kv_picture import Picture, page
from streamkv.errors import ConfigError

__all__ = ["add_arguments", "run"]

_PROTOCOL: Final = "streamkv.kv.v1.json"
_HOME, _REST, _SHOW, _HIDE = "\x1b[H", "\x1b[J", "\x1b[?25h\x1b[?1049l", "\x1b[?1049h\x1b[?25l"
_LARGEST: Final = 64 << 20
_PLAIN_SIZE: Final = (100, 60)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (%(default)s)")
    parser.add_argument("--once", action="store_true", help="print one page and leave")
    parser.add_argument("--no-color", action="store_true", help="plain characters")
    parser.epilog = "STREAMKV_ADMIN_KEY or STREAMKV_API_KEY in the environment is sent as the key; an admin sees every tenant."


def run(arguments: argparse.Namespace) -> int:
    """Show pages until Ctrl-C, or one."""
    return asyncio.run(_top(arguments))


async def _top(arguments: argparse.Namespace) -> int:
    interactive = sys.stdout.isatty() and not arguments.once
    colour = sys.stdout.isatty() and not arguments.no_color and "NO_COLOR" not in os.environ
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    picture = Picture()
    watching = asyncio.create_task(_watch(arguments, picture, interactive=interactive, colour=colour))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            return 0
        watching.result()
        if not arguments.once:
            raise ConfigError("the server has ended the connection")
    finally:
        for task in (watching, stopping):
            task.cancel()
        await asyncio.gather(watching, stopping, return_exceptions=True)
    return 0


async def _watch(arguments: argparse.Namespace, picture: Picture, *, interactive: bool, colour: bool) -> None:
    entered = False
    try:
        async for message in _messages(arguments.url):
            picture.take(message)
            if interactive and not entered:
                entered = True
                _write(_HIDE)
            _show(picture, arguments.url, interactive=interactive, colour=colour)
            if arguments.once:
                return
    finally:
        if entered:
            _write(_SHOW)


async def _messages(url: str) -> AsyncIterator[dict[str, Any]]:
    parts = urlsplit(url)
    scheme = {"https": "wss", "wss": "wss"}.get(parts.scheme, "ws")
    key = os.environ.get("STREAMKV_ADMIN_KEY") or os.environ.get("STREAMKV_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    live = urlunsplit((scheme, parts.netloc, "/v1/kv/live", "", ""))
    try:
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(live, protocols=[_PROTOCOL], headers=headers, max_msg_size=_LARGEST, heartbeat=20.0) as socket,
        ):
            async for frame in socket:
                if frame.type is aiohttp.WSMsgType.TEXT:
                    yield msgspec.json.decode(frame.data)
    except aiohttp.WSServerHandshakeError as error:
        hint = "; set STREAMKV_API_KEY or STREAMKV_ADMIN_KEY" if error.status in (401, 403) else ""
        raise ConfigError(f"{live} answers {error.status}{hint}") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ConfigError(f"cannot connect to {live}: is the server running?") from error


def _show(picture: Picture, url: str, *, interactive: bool, colour: bool) -> None:
    columns, rows = shutil.get_terminal_size(_PLAIN_SIZE) if sys.stdout.isatty() else _PLAIN_SIZE
    lines = page(picture, url, columns, rows - 1 if interactive else rows, colour=colour)
    if interactive:
        # Overwritten in place, each line cleared to its end: nothing flickers.
        _write(_HOME + "".join(f"{line}\x1b[K\r\n" for line in lines) + _REST)
    else:
        _write("\n".join(line.rstrip() for line in lines) + "\n\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

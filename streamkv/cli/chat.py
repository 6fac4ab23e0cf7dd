"""`streamkv chat`: talk to a running server. Ctrl-C ends the answer, Ctrl-C or Ctrl-D at the prompt ends the program."""

from __future__ import annotations

import argparse
import asyncio
import codecs
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streamkv.client import Client, RemoteError, connect

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--url",
        default="ws://127.0.0.1:8000/v1/stream",
        help="(%(default)s); its API key, if any, is taken from STREAMKV_API_KEY",
    )
    parser.add_argument("--once", metavar="TEXT", help="say this, print the answer, leave")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 = always the most probable token (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: what fits)")
    parser.add_argument("--seed", type=int)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the end of input."""
    return asyncio.run(_chat(arguments))


async def _chat(arguments: argparse.Namespace) -> int:
    history: list[dict[str, str]] = []
    if arguments.system:
        history.append({"role": "system", "content": arguments.system})
    sampling: dict[str, Any] = {"temperature": arguments.temperature}
    for name in ("max_tokens", "seed"):
        if getattr(arguments, name) is not None:
            sampling[name] = getattr(arguments, name)
    async with connect(arguments.url, api_key=os.environ.get("STREAMKV_API_KEY") or None) as client:
        interrupts = _Interrupts()
        if arguments.once is not None:
            history.append({"role": "user", "content": arguments.once})
            return 0 if await _answer(client, history, sampling, interrupts) else 1
        assert client.welcome is not None
        print(f"{client.welcome.models[0]} at {arguments.url}. Ctrl-C ends an answer, Ctrl-D the chat.")
        keyboard = _Keyboard(interrupts)
        while (line := await keyboard.line("> ")) is not None:
            if not line.strip():
                continue
            history.append({"role": "user", "content": line})
            if not await _answer(client, history, sampling, interrupts):
                history.pop()
    return 0


class _Interrupts:
    """Ctrl-C from now on: whoever listens is told; when nobody does, between a prompt and an answer, the next one who will."""

    def __init__(self) -> None:
        self._listener: Callable[[], object] | None = None
        self._pressed = False
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._press)

    def _press(self) -> None:
        if self._listener is None:
            self._pressed = True
        else:
            self._listener()

    @contextmanager
    def heard_by(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have it called at every Ctrl-C within the block, and at once for one that came just before."""
        self._listener = listener
        if self._pressed:
            self._pressed = False
            listener()
        try:
            yield
        finally:
            self._listener = None


async def _answer(client: Client, history: list[dict[str, str]], sampling: dict[str, Any], interrupts: _Interrupts) -> bool:
    """Print one answer as it comes and add it to the history; False if the server refused."""
    loop = asyncio.get_running_loop()
    stream = client.chat(history, **sampling)
    cancels: list[asyncio.Task[None]] = []
    with interrupts.heard_by(lambda: cancels.append(loop.create_task(stream.cancel()))):
        try:
            async for delta in stream:
                print(delta.x, end="", flush=True)
        except RemoteError as error:
            print(f"[{error.remote_code}] {error.message}", file=sys.stderr)
            return False
    assert stream.done is not None
    ending = {"cancelled": " [stopped]", "length": " [cut at the length limit]"}.get(stream.done.finish_reason, "")
    print(ending)
    history.append({"role": "assistant", "content": stream.text})
    return True


class _Keyboard:
    """Lines of standard input, read off the loop's readiness so that the connection stays alive meanwhile.

    Not `sys.stdin.readline`: it may take several lines from the system at once, and of those that it keeps nobody tells the loop.
    """

    def __init__(self, interrupts: _Interrupts) -> None:
        self._interrupts = interrupts
        self._file = sys.stdin.fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._ended = False

    async def line(self, prompt: str) -> str | None:
        """The next line; None at the end of input or at Ctrl-C."""
        print(prompt, end="", flush=True)
        while "\n" not in self._text and not self._ended:
            if not await self._readable():
                print()
                return None
            data = os.read(self._file, 65536)
            self._ended = not data
            self._text += self._decoder.decode(data, final=self._ended)
        line, _, self._text = self._text.partition("\n")
        if self._ended and not line and not self._text:
            print()
            return None
        return line

    async def _readable(self) -> bool:
        """Wait for input; False if Ctrl-C comes first."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[bool] = loop.create_future()

        def settle(value: bool) -> None:
            if not result.done():
                result.set_result(value)

        try:
            loop.add_reader(self._file, settle, True)
        except PermissionError:
            return True  # an ordinary file, which is always readable
        try:
            with self._interrupts.heard_by(lambda: settle(False)):
                return await result
        finally:
            loop.remove_reader(self._file)

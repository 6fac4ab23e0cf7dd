"""The command line: `streamkv serve | chat | generate | keys | top | bench`. Each is imported only when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from streamkv import __version__
from streamkv.errors import StreamKVError

__all__ = ["COMMANDS", "main"]

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("streamkv.cli.serve", "serve a model over WebSocket"),
    "chat": ("streamkv.cli.chat", "talk to a running server"),
    "generate": ("streamkv.cli.generate", "complete a file of prompts offline"),
    "keys": ("streamkv.cli.keys", "make API keys"),
    "top": ("streamkv.cli.top", "watch a running server: requests, speed, KV blocks"),
    "bench": ("streamkv.cli.bench", "measure a running server"),
}
"""Name -> (module with `add_arguments(parser)` and `run(arguments) -> int`, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0, 1 for an error that has been explained, 2 for a wrong command line, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="streamkv", description="A small LLM-streaming server.")
    parser.add_argument("--version", action="version", version=f"streamkv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = arguments[0] if arguments else ""
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        status: int = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    except StreamKVError as error:
        print(f"streamkv: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status

"""`streamkv keys new TENANT`: make an API key. Nothing is written: the key goes to its owner, the lines go into the keys file."""

from __future__ import annotations

import argparse
import re

from streamkv.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a key", description="Make a key and the lines for the file of --api-keys.")
    new.add_argument("tenant", help="whose key it is: A-Z a-z 0-9 _ . -")
    new.add_argument("--admin", action="store_true", help="it may use admin routes")
    new.add_argument("--note", default="", help="for people who read the file")


def run(arguments: argparse.Namespace) -> int:
    """Print both."""
    from streamkv.server.keys import new_key, parse_keys

    key, digest = new_key()
    note = re.sub(r'[\x00-\x1f\x7f"\\]', "", arguments.note)
    lines = ["[[keys]]", f'tenant = "{arguments.tenant}"', f'sha256 = "{digest}"']
    lines += ["admin = true"] if arguments.admin else []
    lines += [f'note = "{note}"'] if note else []
    text = "\n".join(lines)
    try:
        parse_keys(text, "these lines")
    except ConfigError as error:
        raise ConfigError("a tenant's name is 1 to 64 of A-Z a-z 0-9 _ . -") from error
    print(f"The key, shown this once. Give it to {arguments.tenant}; clients send it as `Authorization: Bearer KEY`:\n\n{key}\n")
    print(f"For the file of `streamkv serve --api-keys`:\n\n{text}")
    return 0

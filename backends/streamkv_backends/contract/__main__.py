"""`python -m streamkv_backends.contract BACKEND`: does it keep the contract?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import entry_points
from pkgutil import resolve_name

from streamkv.attention import AttentionBackend
from streamkv_backends.contract import cases, check, check_refusals

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one backend and print a line per case.

    Returns:
        0 if it keeps the contract, 1 if not, 2 if no case was chosen.
    """
    parser = argparse.ArgumentParser(prog="python -m streamkv_backends.contract", description="Check an attention backend.")
    parser.add_argument("backend", help="package.module:Class, or a name in the entry-point group streamkv.backends")
    parser.add_argument("--device", default="auto", help="handed to the class as it is (default: auto)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains this")
    options = parser.parse_args(arguments)
    backend = _find(options.backend, parser)(options.device)
    total = failed = 0
    for name, verify in _checks(backend):
        if options.only in name:
            total += 1
            failed += not _passes(name, verify)
    sys.stdout.write(f"{total} checks, {failed} failed\n")
    return 2 if total == 0 else int(failed > 0)


def _checks(backend: AttentionBackend) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "refusals", partial(check_refusals, backend)
    for case in cases(backend.limits):
        yield case.name, partial(check, backend, case)


def _passes(name: str, verify: Callable[[], None]) -> bool:
    try:
        verify()
    except AssertionError as error:
        sys.stdout.write(f"FAILED  {error}\n")
        return False
    sys.stdout.write(f"ok      {name}\n")
    return True


def _find(name: str, parser: argparse.ArgumentParser) -> Callable[[str], AttentionBackend]:
    if ":" not in name:
        known = {entry.name: entry.value for entry in entry_points(group="streamkv.backends")}
        if name not in known:
            parser.error(f"backend {name!r} is not installed; there are {', '.join(sorted(known))}, or package.module:Class")
        name = known[name]
    found: Callable[[str], AttentionBackend] = resolve_name(name)
    return found


if __name__ == "__main__":
    raise SystemExit(main())

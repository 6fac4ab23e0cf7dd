"""The process that holds one engine: `python -m benchmarks.compare.worker FD ADAPTER`.

FD is one end of a socket pair. The first message has the options, then each is answered until the other end is closed. What
libraries print goes where the parent has pointed stdout and stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        _serve(connection, importlib.import_module(f"benchmarks.compare.adapters.{sys.argv[2]}"))
    except Exception as error:
        traceback.print_exc()
        _send(connection, {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _serve(connection: Connection, adapter: Any) -> None:
    with adapter.opened(json.loads(connection.recv_bytes())) as engine:
        _send(connection, {"value": engine.facts})
        while True:
            try:
                message = json.loads(connection.recv_bytes())
            except EOFError:
                return
            gc.collect()
            _send(connection, {"value": engine.answer(message)})


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()

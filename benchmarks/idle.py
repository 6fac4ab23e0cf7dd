"""Memory of an idle connection.

python -m benchmarks.idle [--connections 5000] [--quick]

Connections that have said hello and been welcomed, to a server in a process of its own. What counts is the growth of its
resident set, after some other connections have made it import and allocate what it needs only once.
"""

from __future__ import annotations

import argparse

from benchmarks.report import print_setting, print_table
from benchmarks.server import LOOPS, MIB, Setting, child, idle_client, serve


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the memory of idle connections")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--loop", choices=LOOPS, default="uvloop", help="of the server (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="50 connections: shows that it runs")
    arguments = parser.parse_args()
    count = 50 if arguments.quick else arguments.connections
    print_setting("streamkv", "aiohttp", "uvloop")
    setting = Setting(streams=1, rate=1.0, seconds=1.0, connections=1, codec="json", loop=arguments.loop, flush_s=0.0)
    header = ["idle connections", "RSS before MiB", "RSS after MiB", "KiB each", "RSS MiB after they have left"]
    print_table("Memory of an idle connection, after hello", header, [_idle(count, setting)])


def _idle(count: int, setting: Setting) -> tuple[str, ...]:
    with child(serve, setting) as (server, to_server):
        port: int = to_server.recv()
        before = after = 0
        for connections in (min(count, 20), count):
            with child(idle_client, port, connections) as (_, to_client):
                before = server.memory_info().rss
                to_client.send("connect")
                assert to_client.recv() == "connected"
                after = server.memory_info().rss
                to_client.send("leave")
                assert to_client.recv() == "left"
        left = server.memory_info().rss
        to_server.send("stop")
        to_server.recv()
    grown = (after - before) / count / 1024
    return f"{count:,}", f"{before / MIB:.1f}", f"{after / MIB:.1f}", f"{grown:.1f}", f"{left / MIB:.1f}"


if __name__ == "__main__":
    main()

"""`streamkv serve [MODEL]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path

import structlog

from streamkv.cli.engine_options import add_engine_arguments, engine_config
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.server.config import ServerConfig, is_loopback

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    defaults = ServerConfig()
    add_engine_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=defaults.host, help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=defaults.port, help="0 = any free port (%(default)s)")
    group.add_argument("--allowed-origin", action="append", default=[], help="browser origin that may connect; may be repeated")
    group.add_argument("--allowed-host", action="append", default=[], help="name that may stand in Host; may be repeated")
    group.add_argument("--max-connections", type=int, default=defaults.max_connections, help="(%(default)s)")
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=defaults.drain_timeout_s,
        help="seconds for running streams at SIGTERM (%(default)s)",
    )
    group.add_argument("--loop", choices=["uvloop", "asyncio"], default="asyncio" if sys.platform == "win32" else "uvloop")
    group.add_argument("--log-format", choices=["console", "json"], default="console")
    group.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 0 if every stream could finish."""
    configure_logs(json=arguments.log_format == "json", level=arguments.log_level)
    engine = engine_config(arguments)
    server = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        allowed_origins=frozenset(arguments.allowed_origin),
        allowed_hosts=frozenset(arguments.allowed_host),
        max_connections=arguments.max_connections,
        drain_timeout_s=arguments.drain_timeout,
    )
    if not is_loopback(server.host):
        structlog.get_logger(__name__).warning("not_only_this_machine", host=server.host, hint="there are no API keys yet")
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(engine, server))


async def _serve(engine_settings: EngineConfig, config: ServerConfig) -> int:
    from streamkv.engine.build import build_engine
    from streamkv.engine.thread import use_short_switch_interval
    from streamkv.server.app import Server, run_until_signalled
    from streamkv.text.streams import TextStreams
    from streamkv.text.tokenizer import load_tokenizer

    use_short_switch_interval()
    async with build_engine(engine_settings) as client:
        tokenizer = load_tokenizer(engine_settings.model_path, max_tokens=client.describe().max_model_len)
        async with TextStreams(client, tokenizer) as streams:
            server = Server(streams, config)
            ready = asyncio.Event()
            announcing = asyncio.create_task(_announce(server, config, ready))
            try:
                complete = await run_until_signalled(server, ready=ready)
            finally:
                announcing.cancel()
    return 0 if complete else 1


async def _announce(server: object, config: ServerConfig, ready: asyncio.Event) -> None:
    """One line to paste into a second terminal."""
    await ready.wait()
    # "Every address" is none that can be connected to everywhere.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # compared, not bound
    host = f"[{host}]" if ":" in host else host
    port = server.port  # type: ignore[attr-defined]  # a Server; importing it here would import aiohttp before it is needed
    print(f"ready. In another terminal:  {_this_program()} chat --url ws://{host}:{port}/v1/stream", flush=True)


def _this_program() -> str:
    """How a shell in the same folder finds it, whether or not its environment is activated."""
    if shutil.which("streamkv"):
        return "streamkv"
    beside = Path(sys.executable).parent / "streamkv"
    if not beside.exists():
        return f"{sys.executable} -m streamkv"
    here = os.path.relpath(beside)
    return here if len(here) < len(str(beside)) else str(beside)

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
from streamkv.cli.observe_options import add_observe_arguments, observer_to
from streamkv.engine.config import EngineConfig
from streamkv.logs import configure_logs
from streamkv.server.config import ServerConfig, is_loopback
from streamkv.server.watchdog import EXIT_STATUS, Watchdog

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
    group.add_argument("--max-connections", type=int, default=defaults.max_connections, help="WebSockets (%(default)s)")
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=defaults.drain_timeout_s,
        help="seconds for running streams at SIGTERM (%(default)s)",
    )
    add_safety_arguments(parser, defaults)
    add_observe_arguments(parser)
    group.add_argument("--loop", choices=["uvloop", "asyncio"], default="asyncio" if sys.platform == "win32" else "uvloop")
    group.add_argument("--log-format", choices=["console", "json"], default="console")
    group.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")


def add_safety_arguments(parser: argparse.ArgumentParser, defaults: ServerConfig) -> None:
    """Options of keys, encryption and limits."""
    group = parser.add_argument_group(
        "safety",
        "STREAMKV_API_KEY and STREAMKV_ADMIN_KEY in the environment are keys of the tenant `default`. See docs/security.md.",
    )
    group.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="API keys, as `streamkv keys new` prints them; read again when changed"
    )
    group.add_argument("--insecure-no-auth", action="store_true", help="serve other machines without any key")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM, not encrypted")
    group.add_argument("--admin-port", type=int, help="admin routes answer here only (default: beside the others)")
    group.add_argument("--admin-host", default=defaults.admin_host, help="(%(default)s)")
    group.add_argument(
        "--slo-ttft",
        type=float,
        default=defaults.slo_ttft_s,
        metavar="SECONDS",
        help="refuse work that would wait longer for its first token (%(default)s)",
    )
    group.add_argument(
        "--max-waiting", type=int, default=defaults.max_waiting, help="requests that wait; more are refused (%(default)s)"
    )
    group.add_argument(
        "--queue-timeout", type=float, metavar="SECONDS", help="end requests that have waited this long (default: never)"
    )
    group.add_argument(
        "--watchdog",
        type=float,
        default=defaults.watchdog_s,
        metavar="SECONDS",
        help="end the process if a step or the event loop hangs this long, 0 = never (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 0 if every stream could finish. If the engine is lost the process ends here, with status 70."""
    configure_logs(json=arguments.log_format == "json", level=arguments.log_level)
    engine = engine_config(arguments)
    server = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        allowed_origins=frozenset(arguments.allowed_origin),
        allowed_hosts=frozenset(arguments.allowed_host),
        max_connections=arguments.max_connections,
        drain_timeout_s=arguments.drain_timeout,
        api_keys=arguments.api_keys,
        api_key=os.environ.get("STREAMKV_API_KEY") or None,
        admin_key=os.environ.get("STREAMKV_ADMIN_KEY") or None,
        insecure_no_auth=arguments.insecure_no_auth,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        admin_port=arguments.admin_port,
        admin_host=arguments.admin_host,
        slo_ttft_s=arguments.slo_ttft,
        max_waiting=arguments.max_waiting,
        queue_timeout_s=arguments.queue_timeout,
        watchdog_s=arguments.watchdog,
        metrics_prefix=arguments.metrics_prefix,
        metrics_public=arguments.metrics_public,
        otel_endpoint=arguments.otel_endpoint,
    )
    check_safety(server)
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        status = runner.run(_serve(engine, server))
    if status == EXIT_STATUS:
        # Not the interpreter's way out: what it would free may be on a device that answers no more, and C++ would abort.
        sys.stdout.flush()
        os._exit(status)
    return status


def check_safety(config: ServerConfig) -> None:
    """Before the model is loaded: find mistakes in files that only the running server needs, and warn of what was asked for.

    Raises:
        ConfigError: the keys or the TLS files cannot be used.
    """
    from streamkv.server.guard import Guard
    from streamkv.server.listener import tls_context

    Guard(config)
    if config.tls_cert is not None and config.tls_key is not None:
        tls_context(config.tls_cert, config.tls_key)
    if not config.has_keys and not all(is_loopback(host) for host in config.addresses):
        structlog.get_logger(__name__).warning("no_keys", host=config.host, hint="whoever reaches this machine may use it")


async def _serve(engine_settings: EngineConfig, config: ServerConfig) -> int:
    from streamkv.runner.imports import import_transformers

    import_transformers()
    from streamkv.engine.build import build_engine
    from streamkv.engine.thread import make_full_collections_rare, use_short_switch_interval
    from streamkv.server.app import Server, run_until_signalled
    from streamkv.text.streams import TextStreams
    from streamkv.text.tokenizer import load_tokenizer

    use_short_switch_interval()
    make_full_collections_rare()
    watchdog = Watchdog(config.watchdog_s)
    try:
        async with build_engine(engine_settings) as client:
            tokenizer = load_tokenizer(engine_settings.model_path, max_tokens=client.describe().max_model_len)
            async with (
                observer_to(config.otel_endpoint, client.describe().model) as observer,
                TextStreams(client, tokenizer, observer=observer) as streams,
            ):
                server = Server(streams, config)
                ready = asyncio.Event()
                announcing = asyncio.create_task(_announce(server, config, ready))
                watchdog.start(client.progress)
                try:
                    complete = await run_until_signalled(server, ready=ready)
                finally:
                    announcing.cancel()
    finally:
        watchdog.stop()  # last: what hangs while it closes hangs as well
    return EXIT_STATUS if server.lost.is_set() else 0 if complete else 1


async def _announce(server: object, config: ServerConfig, ready: asyncio.Event) -> None:
    """One line to paste into a second terminal."""
    await ready.wait()
    # "Every address" is none that can be connected to everywhere.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # compared, not bound
    host = f"[{host}]" if ":" in host else host
    scheme = "ws" if config.tls_cert is None else "wss"
    port = server.port  # type: ignore[attr-defined]  # a Server; importing it here would import aiohttp before it is needed
    print(f"ready. In another terminal:  {_this_program()} chat --url {scheme}://{host}:{port}/v1/stream", flush=True)


def _this_program() -> str:
    """How a shell in the same folder finds it, whether or not its environment is activated."""
    if shutil.which("streamkv"):
        return "streamkv"
    beside = Path(sys.executable).parent / "streamkv"
    if not beside.exists():
        return f"{sys.executable} -m streamkv"
    here = os.path.relpath(beside)
    return here if len(here) < len(str(beside)) else str(beside)

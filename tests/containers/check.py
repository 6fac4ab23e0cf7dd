"""Build the image and run the compose stack for real: `make compose-check`, or `python -m tests.containers.check`.

Needs docker with `docker compose`, or podman with podman-compose; an index with CPU builds of torch for the build; the pinned
images of Prometheus and Grafana, pulled or already here. What cannot be had is a row that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

import yaml

from streamkv.client import connect
from tests.containers.engine import ROOT, Engine, find
from tests.containers.observability import check_observability
from tests.containers.report import Report, until

IMAGE: Final = "streamkv:cpu"
READY_S: Final = 120.0
LONG_S: Final = 8.0
"""How long a stream takes that is to be still running when the signal comes, and to end well within the time for draining."""
STORY: Final = [{"role": "user", "content": "Tell me a long story about a fox."}]
COMPOSE: Final = yaml.safe_load((ROOT / "compose.yaml").read_text())


class Server:
    """The service `streamkv` of the running stack, as its users reach it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.port = int(engine.environment["STREAMKV_PORT"])
        self.key = engine.environment["STREAMKV_API_KEY"]
        self.admin_key = engine.environment["STREAMKV_ADMIN_KEY"]
        self.tokens_per_s = 0.0

    def get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        """(status, body); 0 if nobody answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def until_ready(self) -> float:
        """Seconds until `/ready` says so on the published port."""
        return until("/ready", READY_S, lambda: self.get("/ready")[0] == 200)

    async def stream(self, then: Callable[[], None] | None = None, **sampling: Any) -> tuple[int, str, bool]:
        """A story over the WebSocket; `then` runs in a thread once it has begun.

        Returns:
            (tokens, finish reason, whether the server said meanwhile that it goes away)
        """
        begin = time.monotonic()
        async with connect(f"ws://127.0.0.1:{self.port}/v1/stream", api_key=self.key, reconnect_s=0) as client:
            stream = client.chat(STORY, **sampling)
            beside = None
            async for _ in stream:
                if then is not None and beside is None:
                    beside = asyncio.create_task(asyncio.to_thread(then))
            drained = client.draining is not None
        self.tokens_per_s = stream.num_tokens / (time.monotonic() - begin)
        if beside is not None:
            await beside
        assert stream.done is not None
        return stream.num_tokens, str(stream.done.finish_reason), drained

    def outlast(self, then: Callable[[], None]) -> int:
        """A stream that is running when `then` ends the server; asserts that all its tokens come, returns their number."""
        wanted = min(1500, max(50, round(self.tokens_per_s * LONG_S)))
        found = asyncio.run(self.stream(then, max_tokens=wanted, ignore_eos=True))
        assert found == (wanted, "length", True), f"{found} of {wanted}"
        return wanted


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="of the image, such as PYTHON_IMAGE"
    )
    parser.add_argument(
        "--build-flag", action="append", default=[], metavar="FLAG", help="of the engine's build: mirrors, volumes"
    )
    parser.add_argument(
        "--stand-ins", action="store_true", help="make Prometheus' image of Debian's package instead of pulling it"
    )
    arguments = parser.parse_args()
    engine = find("streamkv-check", environment())
    if engine is None:
        print(
            "no container engine runs here; start docker (with docker compose) or install podman and podman-compose",
            file=sys.stderr,
        )
        return 1
    print_setting(engine)
    report = Report()
    try:
        check_build(engine, report, arguments)
        if not report.count("failed"):
            check_server(engine, report)
            check_observability(engine, report, arguments)
            check_ends(Server(engine), report)
    finally:
        engine.attempt(*engine.composer, "-p", engine.project, "--profile", "observability", "down", "--volumes")
    print(f"\n{report.table()}\n\n{', '.join(f'{report.count(word)} {word}' for word in ('passed', 'failed', 'skipped'))}")
    return 1 if report.count("failed") else 0


def environment() -> dict[str, str]:
    """Of everything that is run: keys and ports of this run alone."""
    ports = {}
    with (
        socket.create_server(("127.0.0.1", 0)) as a,
        socket.create_server(("127.0.0.1", 0)) as b,
        socket.create_server(("127.0.0.1", 0)) as c,
    ):
        for name, listener in (("STREAMKV", a), ("PROMETHEUS", b), ("GRAFANA", c)):
            ports[f"{name}_PORT"] = str(listener.getsockname()[1])
    keys = {name: secrets.token_urlsafe(32) for name in ("STREAMKV_API_KEY", "STREAMKV_ADMIN_KEY", "GRAFANA_PASSWORD")}
    return {**os.environ, **ports, **keys}


def print_setting(engine: Engine) -> None:
    """Date and versions."""
    composer = engine.attempt(*engine.composer, "version").stdout
    versions = [
        engine.run("--version"),
        next(line for line in composer.splitlines() if "compose" in line),
        f"Linux {platform.release()}",
    ]
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}: {', '.join(version.strip() for version in versions)}", flush=True)


def check_build(engine: Engine, report: Report, arguments: argparse.Namespace) -> None:
    """The image, and what it and compose say to whoever forgets the key."""
    with report.row("the image builds") as notes:
        begin = time.monotonic()
        engine.build(IMAGE, "Dockerfile", arguments.build_arg, arguments.build_flag)
        size = int(engine.run("image", "inspect", "--format", "{{.Size}}", IMAGE))
        notes += [f"{size / 1e6:.0f} MB", f"{time.monotonic() - begin:.0f} s"]
    with report.row("without a key compose starts nothing") as notes:
        refused = engine.attempt(*engine.composer, "-p", engine.project, "up", "-d", "--no-build", STREAMKV_API_KEY="")
        sentence = refused.stdout.strip().splitlines()[-1]
        assert refused.returncode != 0
        assert "STREAMKV_API_KEY" in sentence
        assert "set it to a key" in sentence
        notes.append(sentence)
    for what, given in (("without a key", ()), ("with a short key", ("--env", "STREAMKV_API_KEY=short"))):
        with report.row(f"{what} the image does not serve") as notes:
            refused = engine.attempt(engine.program, "run", "--rm", *given, IMAGE)
            (sentence,) = refused.stdout.strip().splitlines()
            assert refused.returncode == 1
            assert "`streamkv keys new" in sentence
            notes.append(sentence)


def check_server(engine: Engine, report: Report) -> None:
    """The default stack: that it serves, and that it is shut in."""
    server = Server(engine)
    with report.row("up, and ready on the published port") as notes:
        engine.compose("up", "-d", "--no-build")
        notes.append(f"{server.until_ready():.1f} s after the container was started")
        assert server.get("/health")[0] == 200
    with report.row("the health check passes") as notes:
        notes.append(f"after {until('healthy', READY_S, lambda: engine.healthy('streamkv')):.0f} s")
    with report.row("no root, no capabilities, no new privileges, system calls filtered") as notes:
        lines = engine.inside("streamkv", "cat", "/proc/1/status").splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert set(status["Uid"]) == {"10001"}, status["Uid"]
        assert all(int(status[name][0], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")), status
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    with report.row("the root file system is read-only, /tmp takes data and runs nothing") as notes:
        mounts = {
            line.split()[1]: line.split()[3].split(",") for line in engine.inside("streamkv", "cat", "/proc/mounts").splitlines()
        }
        assert "ro" in mounts["/"]
        assert {"rw", "noexec", "size=65536k"} <= set(mounts["/tmp"]), mounts["/tmp"]
    with report.row("memory, processes and open files are bounded, and so is the log") as notes:
        limits = engine.inspect("streamkv", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}")
        assert limits == f"{4 << 30} 1024", limits
        files = next(line for line in engine.inside("streamkv", "cat", "/proc/1/limits").splitlines() if "open files" in line)
        assert files.split()[3:5] == ["16384", "16384"], files
        used = int(engine.inside("streamkv", "sh", "-c", "grep VmHWM /proc/1/status").split()[1])
        notes.append(f"at most {used / 1e3:.0f} MB resident so far")
        log = engine.inspect("streamkv", "{{json .HostConfig.LogConfig}}")
        assert "10m" in log.lower(), log
    with report.row("keys: none, a wrong one, a client's, an administrator's"):
        found = [server.get("/v1/models", key)[0] for key in (None, "wrong-key-of-nobody", server.key)]
        found += [server.get("/metrics", key)[0] for key in (None, server.key, server.admin_key)]
        assert found == [401, 401, 200, 401, 403, 200], found
    with report.row("`streamkv chat` from outside") as notes:
        command = (
            sys.executable,
            "-m",
            "streamkv",
            "chat",
            "--url",
            f"ws://127.0.0.1:{server.port}/v1/stream",
            "--once",
            "Hello!",
        )
        said = subprocess.run(
            command, cwd=ROOT, env=dict(engine.environment), capture_output=True, text=True, timeout=60, check=True
        )
        assert len(said.stdout.split()) >= 2
        notes.append(said.stdout.strip())
    with report.row("a WebSocket client from outside") as notes:
        tokens, reason, _ = asyncio.run(server.stream(max_tokens=80))
        assert tokens > 20
        notes.append(f"{tokens} tokens, {reason}, {server.tokens_per_s:.0f} tokens/s")


def check_ends(server: Server, report: Report) -> None:
    """A crash, an upgrade, a stop."""
    engine = server.engine
    grace_s = float(COMPOSE["services"]["streamkv"]["stop_grace_period"].removesuffix("s"))
    with report.row("a killed process is started again by the restart policy") as notes:
        before = int(engine.inspect("streamkv", "{{.State.Pid}}"))
        engine.kill_process(before, IMAGE)
        again = until("a new process", READY_S, lambda: int(engine.inspect("streamkv", "{{.State.Pid}}")) not in (0, before))
        ready = server.until_ready()
        assert engine.inspect("streamkv", "{{.RestartCount}}") == "1"
        notes.append(f"new process after {again:.1f} s, ready {ready:.1f} s later")
    with report.row("an upgrade lets a running stream end first") as notes:
        old = engine.container("streamkv")
        tokens = server.outlast(lambda: engine.compose("up", "-d", "--no-build", "--force-recreate", "streamkv"))
        assert engine.container("streamkv") != old
        notes.append(f"all {tokens} tokens came; the new one was ready {server.until_ready():.1f} s later")
    with report.row("stop: a running stream ends first, then the server, with status 0") as notes:
        begin = time.monotonic()
        tokens = server.outlast(lambda: engine.compose("stop", "streamkv"))
        seconds = time.monotonic() - begin
        assert engine.inspect("streamkv", "{{.State.Running}} {{.State.ExitCode}}") == "false 0"
        assert seconds < grace_s, seconds
        (drained,) = (json.loads(line) for line in engine.logs("streamkv").splitlines() if '"drained"' in line)
        assert drained["complete"] is True
        notes.append(f"all {tokens} tokens came; stopped {seconds:.1f} s after the stream began, of {grace_s:.0f}")
    with report.row("stop without a stream") as notes:
        engine.compose("start", "streamkv")
        server.until_ready()
        begin = time.monotonic()
        engine.compose("stop", "streamkv")
        assert engine.inspect("streamkv", "{{.State.Running}} {{.State.ExitCode}}") == "false 0"
        notes.append(f"{time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())

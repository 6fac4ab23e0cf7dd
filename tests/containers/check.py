"""Build the image and run the compose stack for real: `make compose-check`, or `python -m tests.containers.check`.

Needs docker with `docker compose`, or podman with podman-compose; an index with CPU builds of torch for the build; the pinned
images of Prometheus and Grafana, pulled or already here. What cannot be had is a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.containers.engine import Engine, find
from tests.containers.observability import check_observability
from tests.containers.overrides import check_overrides
from tests.containers.pages import COMPOSE, ROOT
from tests.containers.report import Report, until
from tests.containers.server import Server

IMAGE: Final = "streamkv:cpu"
READY_S: Final = 120.0


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="such as PYTHON_IMAGE=...")
    parser.add_argument("--build-flag", action="append", default=[], metavar="FLAG", help="of the engine's build")
    parser.add_argument("--stand-ins", action="store_true", help="Prometheus' image is made of Debian's package, not pulled")
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
            server = Server(engine)
            check_server(server, report)
            check_observability(engine, report, arguments)
            check_ends(server, report)
            check_overrides(server, report)
    finally:
        engine.attempt_compose("--profile", "observability", "down", "--volumes")
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
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STREAMKV_")}
    return {**inherited, **ports, **keys}


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
        refused = engine.attempt_compose("up", "-d", "--no-build", STREAMKV_API_KEY="")
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


def check_server(server: Server, report: Report) -> None:
    """The default stack: that it serves, and that it is shut in."""
    engine = server.engine
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
    with report.row("the kernels for this processor are in the image") as notes:
        program = "from streamkv_backends.cpu.build import detect, find_or_build; print(find_or_build(detect()))"
        library = Path(engine.inside("streamkv", "python3", "-c", program).strip())
        assert library.parent.name == "prebuilt"
        notes.append(library.name)
    with report.row("keys: none, a wrong one, a client's, an administrator's"):
        found = [server.get("/v1/models", key)[0] for key in (None, "wrong-key-of-nobody", server.key)]
        found += [server.get("/metrics", key)[0] for key in (None, server.key, server.admin_key)]
        assert found == [401, 401, 200, 401, 403, 200], found
    with report.row("`streamkv chat` from outside") as notes:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        command = (sys.executable, "-m", "streamkv", "chat", "--url", url, "--once", "Hello!")
        said = subprocess.run(
            command, cwd=ROOT, env=dict(engine.environment), capture_output=True, text=True, timeout=60, check=True
        )
        assert len(said.stdout.split()) >= 2
        notes.append(said.stdout.strip())
    with report.row("a WebSocket client from outside") as notes:
        tokens, reason, _ = server.talk(max_tokens=80)
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

"""The examples of a compose.override.yaml in docs/deploy.md, running: a model of one's own, the hub's cache, keys in a file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import yaml

import streamkv.demo
from tests.containers.pages import ROOT, overrides
from tests.containers.report import Report, until
from tests.containers.server import Server

__all__ = ["check_overrides"]

REREAD_S: Final = 10.0


def check_overrides(server: Server, report: Report) -> None:
    """One after the other, and the plain stack again."""
    own, hub, keys = overrides()
    with tempfile.TemporaryDirectory(prefix="compose-check-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the user in the container is another one
        with report.row("the override for a model of one's own"):
            shutil.copytree(Path(streamkv.demo.__file__).parent / "model", folder / "mine")
            _up(server, folder, own, "/srv/models/mine", folder / "mine")
            assert b'"mine"' in server.get("/v1/models", server.key)[1]
            assert server.talk(max_tokens=8)[0] == 8
        with report.row("the override for the hub: its cache can be written to, and lasts"):
            files = _files(folder, hub)
            kept = "/home/streamkv/.cache/kept"
            for program in (f"open('{kept}', 'w').write('x')", f"assert open('{kept}').read() == 'x'"):
                words = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "python3", "streamkv", "-c", program)
                server.engine.compose(*files, *words)
        with report.row("the override for keys in a file, one of them added while it runs") as notes:
            first, lines = _new_key("acme")
            (folder / "keys").mkdir()
            (folder / "keys" / "keys.toml").write_text(lines)
            _up(server, folder, keys, "/srv/keys", folder / "keys")
            second, more = _new_key("other")
            assert [server.get("/v1/models", key)[0] for key in (first, second)] == [200, 401]
            (folder / "keys" / "new").write_text(lines + more)
            (folder / "keys" / "new").replace(folder / "keys" / "keys.toml")  # as editors do
            notes.append(f"after {until('the key', REREAD_S, lambda: server.get('/v1/models', second)[0] == 200):.1f} s")
        server.engine.compose("up", "-d", "--no-build", "--force-recreate", "streamkv")
        server.until_ready()


def _files(folder: Path, override: dict[str, Any]) -> tuple[str, ...]:
    path = folder / "override.yaml"
    path.write_text(yaml.safe_dump(override))
    return ("-f", str(path))


def _up(server: Server, folder: Path, override: dict[str, Any], written: str, real: Path) -> None:
    """Start the service with the override, whose folder `written` is `real` here."""
    service = override["services"]["streamkv"]
    service["volumes"] = [volume.replace(written + ":", f"{real}:") for volume in service["volumes"]]
    server.engine.compose(*_files(folder, override), "up", "-d", "--no-build", "--force-recreate", "streamkv")
    server.until_ready()


def _new_key(tenant: str) -> tuple[str, str]:
    """(key, lines for the file)."""
    command = (sys.executable, "-m", "streamkv", "keys", "new", tenant)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, key, _, lines = made.stdout.split("\n\n")
    return key, lines

"""A container engine and its compose, by their command lines: docker or podman, whichever runs here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from tests.containers.pages import ROOT

__all__ = ["Engine", "find"]

_LIMIT_S: Final = 120
_BUILD_LIMIT_S: Final = 3600
_CANDIDATES: Final = (("docker", ("docker", "compose")), ("podman", ("podman-compose",)), ("podman", ("podman", "compose")))


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs commands in the repository's root.

    Attributes:
        program: docker or podman.
        composer: the words that its compose begins with.
        project: what compose calls what it makes here.
        environment: of every command; compose reads its variables from there.
    """

    program: str
    composer: tuple[str, ...]
    project: str
    environment: Mapping[str, str]

    def run(self, *words: str, limit_s: float = _LIMIT_S) -> str:
        """A command of the engine; its output.

        Raises:
            AssertionError: it failed; the message is the end of what it said.
        """
        return _said(self.attempt(self.program, *words, limit_s=limit_s))

    def compose(self, *words: str, **environment: str) -> str:
        """A command of compose; as `run`."""
        return _said(self.attempt_compose(*words, **environment))

    def attempt_compose(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of compose, which may fail. An override that lies in the checkout is not read."""
        return self.attempt(*self.composer, "-p", self.project, "-f", "compose.yaml", *words, environment=environment)

    def attempt(
        self, *command: str, limit_s: float = _LIMIT_S, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Any command, which may fail; both outputs in one. `environment`: what differs."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def build(self, image: str, file: str, arguments: Iterable[str], flags: Iterable[str]) -> None:
        """Make an image of the checkout."""
        given = [word for argument in arguments for word in ("--build-arg", argument)]
        self.run("build", *flags, *given, "-t", image, "-f", file, ".", limit_s=_BUILD_LIMIT_S)

    def has_image(self, image: str) -> bool:
        """Here, or after pulling it."""
        for words in (("image", "inspect", image), ("pull", image)):
            if self.attempt(self.program, *words, limit_s=_BUILD_LIMIT_S).returncode == 0:
                return True
        return False

    def container(self, service: str) -> str:
        """The id of the service's container, running or not."""
        labels = {"com.docker.compose.project": self.project, "com.docker.compose.service": service}
        filters = [word for label, value in labels.items() for word in ("--filter", f"label={label}={value}")]
        found = self.run("ps", "--all", "--quiet", *filters).split()
        assert len(found) == 1, f"{len(found)} containers of the service {service}"
        return found[0]

    def inspect(self, service: str, template: str) -> str:
        """A fact of the service's container, by a Go template."""
        return self.run("inspect", "--format", template, self.container(service)).strip()

    def logs(self, service: str) -> str:
        """What the service has written so far."""
        return self.run("logs", self.container(service))

    def inside(self, service: str, *command: str) -> str:
        """The output of a command in the service's container."""
        return self.run("exec", self.container(service), *command)

    def healthy(self, service: str) -> bool:
        """What its health check says. podman leaves checking to systemd, so there it is asked to check now."""
        if self.program == "podman":
            return self.attempt("podman", "healthcheck", "run", self.container(service)).returncode == 0
        return self.inspect(service, "{{.State.Health.Status}}") == "healthy"

    def kill_process(self, pid: int, image: str) -> None:
        """SIGKILL from outside the container: the engine's own `kill` would count as a wish to stop it."""
        rights = ("--pid", "host", "--user", "0", "--cap-drop", "ALL", "--cap-add", "KILL", "--network", "none")
        self.run("run", "--rm", *rights, "--entrypoint", "python3", image, "-c", f"import os; os.kill({pid}, 9)")


def find(project: str, environment: Mapping[str, str]) -> Engine | None:
    """The first engine that answers and has a compose."""
    for program, composer in _CANDIDATES:
        engine = Engine(program, composer, project, environment)
        if shutil.which(program) is None or shutil.which(composer[0]) is None:
            continue
        if all(engine.attempt(*words).returncode == 0 for words in ((program, "info"), (*composer, "version"))):
            return engine
    return None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"`{' '.join(done.args[:6])} ...` ended with {done.returncode}: {done.stdout[-800:]}"
    return done.stdout

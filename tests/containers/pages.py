"""compose.yaml, the Dockerfile and what docs/deploy.md says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

__all__ = ["COMPOSE", "ROOT", "deploy_page", "overrides", "variables"]

ROOT: Final = Path(__file__).resolve().parents[2]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())


def deploy_page() -> str:
    """docs/deploy.md."""
    return (ROOT / "docs" / "deploy.md").read_text()


def overrides() -> list[dict[str, Any]]:
    """Its examples of a compose.override.yaml, in order: a folder, the hub, keys."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", deploy_page(), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def variables() -> dict[str, str | None]:
    """What compose.yaml reads from the environment: (name, default); None = it must be set."""
    found: dict[str, str | None] = {}
    text = "\n".join(line for line in (ROOT / "compose.yaml").read_text().splitlines() if not line.lstrip().startswith("#"))
    for name, kind, rest in re.findall(r"(?<!\$)\$\{(\w+):([-?])([^}]*)\}", text):
        found[name] = None if kind == "?" else found.get(name) or rest
    return found | dict.fromkeys(COMPOSE["services"]["streamkv"]["build"]["args"], "")

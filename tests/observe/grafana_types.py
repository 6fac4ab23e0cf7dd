"""Check the dashboards against the types that Grafana publishes, of the version that compose.yaml starts.

`python -m tests.observe.grafana_types` needs npm. The dashboards become TypeScript literals, in which a misspelt or unknown field
is an error. Plugins keep their own fields where the dashboard's type says "anything"; those of the one kind of panel that is used
here are checked as well.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.containers.pages import COMPOSE
from tests.observe.dashboards import DASHBOARDS

HEAD = """
import type { Dashboard, GraphFieldConfig, VizLegendOptions, VizTooltipOptions } from '@grafana/schema';
type Part<T> = T extends object ? { [K in keyof T]?: Part<T[K]> } : T extends string ? T | `${T}` : T;
type Options = { legend: VizLegendOptions; tooltip: VizTooltipOptions };
"""
COMPILE = ("npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", "check.ts")


def literals() -> str:
    """Everything as typed constants."""
    typed: list[tuple[str, Any]] = []
    for dashboard in DASHBOARDS.values():
        typed.append(("Dashboard", _without_definitions(dashboard)))
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                assert panel["type"] == "timeseries", "say here which type its options have"
                typed += [("GraphFieldConfig", panel["fieldConfig"]["defaults"]["custom"]), ("Options", panel["options"])]
    lines = [f"export const c{n}: Part<{kind}> = {json.dumps(value)};" for n, (kind, value) in enumerate(typed)]
    return "\n".join([HEAD, *lines])


def _without_definitions(dashboard: dict[str, Any]) -> dict[str, Any]:
    """Grafana writes a variable's `definition` itself when it saves a dashboard, and its types leave it out."""
    variables = [{k: v for k, v in variable.items() if k != "definition"} for variable in dashboard["templating"]["list"]]
    return dashboard | {"templating": {"list": variables}}


def main() -> int:
    """The compiler's exit status."""
    version = re.fullmatch(r".*:([\d.]+)", COMPOSE["services"]["grafana"]["image"])
    assert version is not None
    with tempfile.TemporaryDirectory(prefix="grafana-types-") as folder:
        (Path(folder) / "check.ts").write_text(literals())
        install = ("npm", "install", "--silent", "--no-fund", "--no-audit", f"@grafana/schema@{version[1]}", "typescript@5")
        subprocess.run(install, cwd=folder, check=True)
        status = subprocess.run(COMPILE, cwd=folder, check=False).returncode
    print(f"{len(DASHBOARDS)} dashboards, @grafana/schema {version[1]}: {'no error' if status == 0 else 'see above'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

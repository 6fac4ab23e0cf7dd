"""The dashboards as Grafana reads them: panels, variables, and queries with the variables filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
FILES: Final = ROOT / "docs" / "observability"
DASHBOARDS: Final = {
    path.stem: json.loads(path.read_text()) for path in sorted((FILES / "grafana" / "dashboards").glob("*.json"))
}
PANELS: Final[list[dict[str, Any]]] = [
    panel for dashboard in DASHBOARDS.values() for panel in dashboard["panels"] if panel["type"] != "row"
]
VARIABLES: Final[dict[str, dict[str, Any]]] = {
    variable["name"]: variable for dashboard in DASHBOARDS.values() for variable in dashboard["templating"]["list"]
}


def filled_in(expression: str, rate_interval: str) -> str:
    """What Grafana sends where every choice is "All".

    Raises:
        KeyError: the expression uses a variable that no dashboard declares.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] == "__rate_interval":
            return rate_interval
        variable = VARIABLES[match[1]]
        assert variable["includeAll"], match[1]
        return str(variable["allValue"])

    return re.sub(r"\$(\w+)", value, expression)


def queries(panel: dict[str, Any], rate_interval: str) -> list[str]:
    """A panel's, filled in."""
    return [filled_in(target["expr"], rate_interval) for target in panel["targets"]]


def label_queries() -> dict[str, tuple[str, str]]:
    """Each variable that Prometheus answers: (the series, the label)."""
    found = {}
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match is not None, name
            found[name] = (filled_in(match[1], ""), match[2])
    return found

"""The compose profile `observability`: Prometheus scrapes with the key, every panel has data, Grafana finds what it was given."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import time
import urllib.parse
import urllib.request
from typing import Any, Final

from streamkv.client import connect
from tests.containers.engine import Engine
from tests.containers.pages import COMPOSE
from tests.containers.report import NotCheckedError, Report, until
from tests.observe.dashboards import DASHBOARDS, PANELS, label_queries, queries

LOAD_S: Final = 30
CLIENTS: Final = 4
SCRAPED_S: Final = 60.0
IMAGES: Final = {name: service["image"] for name, service in COMPOSE["services"].items() if "profiles" in service}


def check_observability(engine: Engine, report: Report, arguments: argparse.Namespace) -> None:
    """Beside the running server."""
    with report.row("Prometheus' image is here") as notes:
        if arguments.stand_ins:
            engine.build(
                IMAGES["prometheus"], "tests/containers/prometheus.Dockerfile", arguments.build_arg, arguments.build_flag
            )
        elif not engine.has_image(IMAGES["prometheus"]):
            raise NotCheckedError(f"{IMAGES['prometheus']} cannot be pulled; --stand-ins makes one of Debian's package")
        said = engine.attempt(engine.program, "run", "--rm", IMAGES["prometheus"], "--version").stdout
        notes.append(next(line for line in said.splitlines() if "version" in line))
    if engine.attempt(engine.program, "image", "inspect", IMAGES["prometheus"]).returncode == 0:
        check_prometheus(engine, report)
    check_grafana(engine, report)


def check_prometheus(engine: Engine, report: Report) -> None:
    """Configuration, key, panels."""
    base = f"http://127.0.0.1:{engine.environment['PROMETHEUS_PORT']}"
    profile = ("--profile", "observability")
    with report.row("without an administrator's key Prometheus does not start") as notes:
        words = (*profile, "run", "--rm", "--no-deps", "-T", "prometheus")
        refused = engine.attempt_compose(*words, STREAMKV_ADMIN_KEY="")
        (sentence,) = (line for line in refused.stdout.splitlines() if "STREAMKV_ADMIN_KEY" in line)
        assert refused.returncode != 0
        notes.append(sentence)
    with report.row("Prometheus scrapes the service by its name, with the key") as notes:
        engine.compose(*profile, "up", "-d", "--no-build", "prometheus")
        notes.append(f"up after {until('a scrape', SCRAPED_S, lambda: _is_up(base)):.1f} s")
    with report.row("Prometheus is no root and cannot write but to its volume"):
        lines = engine.inside("prometheus", "cat", "/proc/1/status").splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert "0" not in status["Uid"]
        assert int(status["CapBnd"][0], 16) == 0
        mounts = {line.split()[1]: line.split()[3] for line in engine.inside("prometheus", "cat", "/proc/mounts").splitlines()}
        assert mounts["/"].startswith("ro")
        assert mounts["/prometheus"].startswith("rw")
    with report.row("every query of every panel has data under load, as Grafana asks it") as notes:
        begin = time.time()
        streams = asyncio.run(_load(engine, LOAD_S))
        results = {(panel["title"], query): _values(base, query, begin) for panel in PANELS for query in queries(panel, "20s")}
        empty = [f"{title}: {query}" for (title, query), values in results.items() if not values]
        assert not empty, empty
        quiet = sorted({title for title, _ in results} - {title for (title, _), values in results.items() if any(values)})
        notes += [f"{len(results)} queries of {len(PANELS)} panels, {streams} streams"]
        if quiet:
            notes.append(f"nothing but zero, as nothing of the kind happened: {', '.join(quiet)}")
    with report.row("the dashboards' variables have choices") as notes:
        for name, (series, label) in label_queries().items():
            chosen = _ask(f"{base}/api/v1/label/{label}/values?{urllib.parse.urlencode({'match[]': series})}")["data"]
            assert chosen, name
            notes.append(f"{name}: {', '.join(chosen)}")
    with report.row("Prometheus counts what clients got") as notes:
        query = "sum(vllm:request_success_total)"
        until("the next scrape", SCRAPED_S, lambda: max(_values(base, query, begin), default=0) >= streams)
        notes.append(f"{max(_values(base, query, begin)):.0f} requests")


def check_grafana(engine: Engine, report: Report) -> None:
    """Data source and dashboards, through its HTTP API."""
    base = f"http://127.0.0.1:{engine.environment['GRAFANA_PORT']}"
    key = {"Authorization": "Basic " + base64.b64encode(f"admin:{engine.environment['GRAFANA_PASSWORD']}".encode()).decode()}
    with report.row("Grafana finds its data source and its dashboards") as notes:
        if not engine.has_image(IMAGES["grafana"]):
            raise NotCheckedError(f"{IMAGES['grafana']} cannot be pulled, and there is no stand-in for it")
        engine.compose("--profile", "observability", "up", "-d", "--no-build", "grafana")
        until("Grafana", SCRAPED_S, lambda: _answers(f"{base}/api/health"))
        assert _ask(f"{base}/api/datasources/uid/prometheus/health", key)["status"] == "OK"
        for name, dashboard in DASHBOARDS.items():
            assert _ask(f"{base}/api/dashboards/uid/{dashboard['uid']}", key)["meta"]["provisioned"], name
        notes.append(_ask(f"{base}/api/health")["version"])


async def _load(engine: Engine, seconds: float) -> int:
    """Clients that talk one after the other, for so long; how many streams ended."""
    url = f"ws://127.0.0.1:{engine.environment['STREAMKV_PORT']}/v1/stream"
    end = time.monotonic() + seconds

    async def one(name: int) -> int:
        streams = 0
        async with connect(url, api_key=engine.environment["STREAMKV_API_KEY"]) as client:
            while time.monotonic() < end:
                async for _ in client.chat(
                    [{"role": "user", "content": f"Tell me story {streams} of client {name}."}], max_tokens=60
                ):
                    pass
                streams += 1
        return streams

    return sum(await asyncio.gather(*map(one, range(CLIENTS))))


def _is_up(base: str) -> bool:
    """One target, seen, without an error."""
    try:
        targets = _ask(f"{base}/api/v1/targets")["data"]["activeTargets"]
    except OSError:
        return False
    return [(target["labels"]["instance"], target["health"]) for target in targets] == [("streamkv:8000", "up")]


def _values(base: str, query: str, begin: float) -> list[float]:
    """Every number of a range query since then."""
    asked = urllib.parse.urlencode({"query": query, "start": begin, "end": time.time(), "step": "5"})
    result = _ask(f"{base}/api/v1/query_range?{asked}")["data"]["result"]
    numbers = [float(value) for series in result for _, value in series["values"]]
    return [number for number in numbers if math.isfinite(number)]


def _answers(url: str) -> bool:
    try:
        _ask(url)
    except OSError:
        return False
    return True


def _ask(url: str, headers: dict[str, str] | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:
        return json.loads(answer.read())

"""The dashboard, Prometheus' configuration and the compose profile: read by their own tools, against a real server."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from streamkv.engine.fake import fake_info
from streamkv.observe.lag import LoopLag
from streamkv.observe.metrics import Metrics
from tests.containers.pages import COMPOSE
from tests.observe.dashboards import DASHBOARDS, FILES, PANELS, ROOT, VARIABLES, label_queries, queries
from tests.server.serving import DEADLINE_S, serving

ADMIN = "an-admin-key-of-a-test-0123456789abcdef"


def test_every_panel_asks_for_metrics_that_exist():
    names = {name for name, _, _ in Metrics(fake_info(), LoopLag()).families("vllm")}
    asked = set()
    for panel in PANELS:
        for target in panel["targets"]:
            for name in re.findall(r"\b(?:vllm:|streamkv:|http_|process_)\w+", target["expr"]):
                asked.add(
                    next(
                        (known for known in names if name in (known, *(known + end for end in ("_bucket", "_sum", "_count")))),
                        name,
                    )
                )
    assert asked <= names, asked - names
    own = {name for name in names if name.startswith("streamkv:")}
    assert own <= asked, f"on no panel: {own - asked}"


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_panels_are_told_apart_and_do_not_overlap(dashboard: dict[str, Any]):
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))


def test_every_query_goes_to_the_data_source_that_is_chosen():
    sources = [panel["datasource"] for panel in PANELS]
    sources += [variable["datasource"] for variable in VARIABLES.values() if variable["type"] == "query"]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert VARIABLES["datasource"]["query"] == "prometheus"


def test_every_variable_is_declared_and_used():
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    used = set(re.findall(r"\$(\w+)", asked)) - {"__rate_interval"}
    assert used == label_queries().keys() == VARIABLES.keys() - {"datasource"}


def test_the_compose_profile_mounts_what_is_there_and_pins_what_is_not_ours():
    services = {name: service for name, service in COMPOSE["services"].items() if service.get("profiles") == ["observability"]}
    assert services.keys() == {"prometheus", "grafana"}
    for name, service in services.items():
        assert re.fullmatch(r"docker\.io/\w+/\w+:v?\d+\.\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "only this machine"
        for volume in service["volumes"]:
            source, _, *mode = volume.split(":")
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]


def test_grafanas_provisioning_finds_the_dashboard_and_prometheus():
    provisioning = FILES / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (job,) = yaml.safe_load((FILES / "prometheus.yml").read_text())["scrape_configs"]
    interval = job.get("scrape_interval") or yaml.safe_load((FILES / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval, "Grafana takes rates over four of these"
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in COMPOSE["services"]
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "streamkv.yml").read_text())["providers"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in COMPOSE["services"]["grafana"]["volumes"]}
    assert (ROOT / mounted[provider["options"]["path"]] / "streamkv.json").exists()


def test_prometheus_is_told_the_services_port_and_the_keys_place():
    (job,) = yaml.safe_load((FILES / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["streamkv:8000"]}]
    assert COMPOSE["services"]["streamkv"]["ports"][0].endswith(":8000")
    place = job["authorization"]["credentials_file"]
    service = COMPOSE["services"]["prometheus"]
    assert f"> {place};" in service["command"][0]
    assert service["tmpfs"][0].split(":")[0] == str(Path(place).parent), "in memory only"


# -- the real programs ------------------------------------------------------------------------------------------------

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="SKIPPED LOUDLY: no `prometheus` here (Debian: apt-get install prometheus)"
)


def config_for(folder: Path, port: int) -> Path:
    """docs/observability/prometheus.yml for another target and another place of the key."""
    config = yaml.safe_load((FILES / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    job["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    (folder / "key").write_text(ADMIN)
    job["authorization"]["credentials_file"] = str(folder / "key")
    config["global"]["scrape_interval"] = "100ms"
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@asynccontextmanager
async def prometheus(folder: Path, target: int) -> AsyncIterator[str]:
    """The real program, scraping that port; its own base URL."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={config_for(folder, target)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
        stdout=sys.stderr,
        stderr=sys.stderr,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def ask(http: aiohttp.ClientSession, url: str, **params: str) -> Any:
    async with http.get(url, params=params) as answer:
        body = await answer.json()
        assert body["status"] == "success", body
        return body["data"]


async def until_scraped(http: aiohttp.ClientSession, base: str, times: int) -> None:
    """Wait until the target is up and has been scraped so often."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                data = await ask(http, f"{base}/api/v1/query", query="count_over_time(vllm:num_requests_running[1m])")
                if data["result"] and int(data["result"][0]["value"][1]) >= times:
                    return
            except (aiohttp.ClientError, AssertionError):
                pass  # it is still starting
            await asyncio.sleep(0.05)


@needs_prometheus
async def test_prometheus_scrapes_a_server_and_every_panel_has_data(tmp_path: Path):
    async with serving(admin_key=ADMIN) as served, prometheus(tmp_path, served.server.port) as base:
        key = {"Authorization": f"Bearer {ADMIN}"}
        async with aiohttp.ClientSession() as http, served.raw(headers=key) as raw:
            await until_scraped(http, base, 2)
            for index in range(20):
                await raw.create(f"s{index}", "abc", max_tokens=20)
                await raw.ended(f"s{index}")
            await until_scraped(http, base, 8)
            (target,) = (await ask(http, f"{base}/api/v1/targets"))["activeTargets"]
            assert (target["health"], target["lastError"]) == ("up", "")
            for panel in PANELS:
                for expression in queries(panel, "1m"):
                    data = await ask(http, f"{base}/api/v1/query", query=expression)
                    assert data["result"], f"{panel['title']}: {expression}"
            data = await ask(http, f"{base}/api/v1/query", query="vllm:request_success_total{finished_reason='length'}")
            assert data["result"][0]["value"][1] == "20"


@needs_prometheus
async def test_without_the_key_the_target_is_down(tmp_path: Path):
    async with serving(admin_key=ADMIN + "another") as served, prometheus(tmp_path, served.server.port) as base:
        async with aiohttp.ClientSession() as http, asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    (target,) = (await ask(http, f"{base}/api/v1/targets"))["activeTargets"]
                    if target["health"] == "down":
                        break
                except (aiohttp.ClientError, AssertionError, ValueError):
                    pass  # it is still starting
                await asyncio.sleep(0.05)
        assert "401" in target["lastError"]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="SKIPPED LOUDLY: no `promtool` here (comes with Debian's prometheus)"
)
async def test_promtool_finds_nothing_wrong_with_the_metrics():
    async with serving() as served, served.http.get(f"{served.base}/metrics") as answer:
        text = await answer.read()
    tool = await asyncio.create_subprocess_exec(
        *("promtool", "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await tool.communicate(text)
    # Its taste in names is not vLLM's: colons, and a histogram whose name ends with _total.
    complaints = [
        line
        for line in output.decode().splitlines()
        if "should not contain ':'" not in line and "iteration_tokens_total" not in line
    ]
    assert not complaints, complaints

"""compose.yaml, the Dockerfile and docs/deploy.md agree with each other and with the server. `make compose-check` runs them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from streamkv.cli import serve
from streamkv.server.config import ServerConfig
from tests.containers.pages import COMPOSE, ROOT, deploy_page, overrides, variables

SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVER = SERVICES["streamkv"]


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_shut_in_and_bounded(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert all(port.startswith("127.0.0.1:${") for port in service["ports"]), "only this machine"
    assert not {"privileged", "cap_add", "network_mode", "pid", "user", "devices"} & service.keys()
    assert all(tmpfs.split(":")[1].startswith("size=") for tmpfs in service["tmpfs"]), "memory is not without bound"


@pytest.mark.parametrize("name", SERVICES)
def test_no_read_only_service_is_given_what_compose_would_have_to_write_into_it(name: str):
    """docker compose refuses it: secrets and configs of a read-only service must be files (docker/compose#12031)."""
    assert not {"secrets", "configs"} & SERVICES[name].keys()


def test_compose_waits_longer_than_the_server_drains():
    assert seconds(SERVER["stop_grace_period"]) >= ServerConfig().drain_timeout_s + 15


def test_files_are_enough_for_all_connections():
    files = SERVER["ulimits"]["nofile"]
    assert files["soft"] == files["hard"] >= 2 * ServerConfig().max_connections


def test_the_health_check_is_the_images():
    (options, command) = re.search(r"^HEALTHCHECK (.*?) \\\n +CMD (.*)$", dockerfile(), re.MULTILINE).groups()  # type: ignore[union-attr]  # it is there
    check = SERVER["healthcheck"]
    assert check["test"] == ["CMD", *json.loads(command)]
    given = dict(option.removeprefix("--").split("=") for option in options.split())
    assert given == {name.replace("_", "-"): str(value) for name, value in check.items() if name != "test"}


def test_the_images_build_arguments_can_be_given_to_compose():
    assert set(re.findall(r"^ARG (\w+)", dockerfile(), re.MULTILINE)) == set(SERVER["build"]["args"])


def test_the_image_runs_as_a_number_and_copies_all_it_needs():
    assert re.search(r"^USER 10001$", dockerfile(), re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*", "nothing gets in but what is named"
    copied = {word for words in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile(), re.MULTILINE) for word in words.split()}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {word.split("/")[0] for word in copied}
    assert all((ROOT / name).exists() for name in copied)


def test_the_page_names_every_variable_and_its_default():
    rows = re.findall(r"^\| ((?:`[A-Z_]+`,? ?)+) \| (.*?) \| ", deploy_page(), re.MULTILINE)
    told = {name: default.strip("`") for names, default in rows for name in re.findall(r"`([A-Z_]+)`", names)}
    words = {None: "must be set", "": "none"}
    wanted = {name: words.get(default, default) for name, default in variables().items()}
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile(), re.MULTILINE)
    assert told == wanted | {"PYTHON_IMAGE": image, "STREAMKV_CPUS": "all"}


def test_the_images_command_and_the_pages_overrides_are_ones_that_the_server_takes():
    (command,) = re.findall(r"^CMD (\[.*\])$", dockerfile(), re.MULTILINE)
    commands = [json.loads(command)]
    for override in overrides():
        (service,) = override["services"].values()
        assert override["services"].keys() <= SERVICES.keys()
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert mode == (["ro"] if source.startswith("/") else [])
            assert source.startswith("/") or source in override["volumes"]
            if mode:
                assert any(word.startswith(target) for word in service["command"]), "what is mounted is used"
        commands.append(service["command"])
    assert len(commands) == 4
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    for words in commands:
        assert words[0] == "serve"
        given = parser.parse_args(words[1:])
        assert (given.host, given.port, given.log_format) == ("0.0.0.0", 8000, "json")


def test_the_hubs_cache_is_where_the_image_lets_the_server_write():
    hub = overrides()[1]["services"]["streamkv"]
    (volume,) = hub["volumes"]
    assert f"install -d -o streamkv -g streamkv {volume.split(':')[1]}" in dockerfile()


def test_the_pages_commands_are_compose_commands_of_services_that_exist():
    lines = [
        line.split("  #")[0].strip()
        for block in re.findall(r"^```sh\n(.*?)^```$", deploy_page(), re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    for line in lines:
        if made := re.fullmatch(r"export (\w+)=\$\((.*)\)", line):
            assert made[1] in variables()
            program = [sys.executable, *shlex.split(made[2])[1:]]
            key = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
            assert len(key) >= 16
            continue
        match shlex.split(line):
            case ["docker", "compose", "--profile", profile, *_]:
                assert profile in profiles
            case ["docker", "compose", "logs", *_, name]:
                assert name in SERVICES
            case ["docker", "compose", action, *_]:
                assert action in {"build", "up", "ps", "stop"}
            case ["docker", "tag", image, _]:
                assert image == SERVER["image"]
            case ["curl", *_, url]:
                assert url == "http://127.0.0.1:8000/ready"
            case words:
                assert words in (["git", "pull"], ["streamkv", "chat", "--once", "Hello!"]), line
    assert len(lines) == 14


def test_what_the_page_says_of_bounds_is_so():
    page = deploy_page()
    assert f"{SERVER['pids_limit']} processes" in page
    assert f"{SERVER['ulimits']['nofile']['soft']} open files" in page
    assert "size=64m" in SERVER["tmpfs"][0]
    assert "64 MiB of `/tmp`" in page
    assert SERVER["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert "three log files of 10 MB" in page
    assert f"running streams have {ServerConfig().drain_timeout_s:.0f} seconds" in page
    assert f"waits {seconds(SERVER['stop_grace_period']):.0f} seconds" in page
    assert {SERVICES[name]["mem_limit"] for name in ("prometheus", "grafana")} == {"1g"}

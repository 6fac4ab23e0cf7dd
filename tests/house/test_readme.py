"""The README's commands and programs are run, as they stand, in the checkout. Only the port is another one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DEADLINE_S = 120.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
PROGRAMS = blocks("python")
# How each command is run here; `make test` is what runs this very test.
RUN_BY = {"make serve": "the fixture", "make test": "whoever runs this", ".venv/bin/streamkv chat": "a test"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, str]]:
    """`make serve` on a free port: (port, the line to paste)."""
    port = free_port()
    process = subprocess.Popen(
        ["make", "serve", f"PORT={port}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        pasted = next((line for line in process.stdout if line.startswith("ready.")), "")
        assert pasted, "the server never became ready"
        yield port, pasted
        os.killpg(process.pid, signal.SIGTERM)
        process.stdout.read()
        process.wait(DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def test_every_command_is_run_by_somebody() -> None:
    assert set(COMMANDS) == set(RUN_BY)
    assert len(PROGRAMS) == 2


def test_the_pasted_line_answers(server: tuple[int, str]) -> None:
    _, pasted = server
    command = pasted.split("terminal:", 1)[1].split()
    done = subprocess.run(
        [*command, "--once", "Hello!"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert len(done.stdout.split()) >= 2, done.stdout


def test_chat_as_written(server: tuple[int, str]) -> None:
    port, _ = server
    command = [*COMMANDS[COMMANDS.index(".venv/bin/streamkv chat")].split(), "--url", f"ws://127.0.0.1:{port}/v1/stream"]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, input="hi\nwhat is a block?\n", timeout=DEADLINE_S
    )
    assert "block" in done.stdout.split("> ")[-2], done.stdout  # after the last answer the prompt comes again


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_as_written(server: tuple[int, str], number: int) -> None:
    port, _ = server
    program = PROGRAMS[number].replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert len(done.stdout.split()) >= 8, done.stdout


def test_what_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"(?:streamkv|backends)/[a-z_]+/", README):
        assert (ROOT / folder).is_dir(), folder


def test_the_first_screen_says_it_all() -> None:
    first = README.splitlines()[:45]
    assert any("make serve" in line for line in first)
    assert any("## What is different here" in line for line in first), "the rest starts after one screen"


def test_options_named_in_the_readme_exist() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "streamkv", "serve", "--help"], check=True, capture_output=True, text=True, timeout=DEADLINE_S
    )
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - {"--help", "--once"}:
        assert option in helped.stdout, option

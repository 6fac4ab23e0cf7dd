"""What docs/backends.md tells a reader to run does run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from streamkv_backends.contract.__main__ import main

DOCS = Path(__file__).parents[2] / "docs" / "backends.md"
COMMAND = ".venv/bin/python -m streamkv_backends.contract "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix(COMMAND) for block in blocks("sh") for line in block.splitlines() if line.startswith(COMMAND)]


def test_commands_keep_what_they_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()) == 2
    for command in commands():
        arguments = shlex.split(command)
        # The whole contract of the third party's backend is run by its own test.
        assert main(arguments if "--only" in arguments else [*arguments, "--only", "one token"]) == 0
    assert "0 failed" in capsys.readouterr().out


def test_the_example_for_a_test_of_your_own_runs() -> None:
    (code,) = blocks("python")
    exec(compile(code, str(DOCS), "exec"), {})

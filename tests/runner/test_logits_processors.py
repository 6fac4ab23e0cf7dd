"""Logits processors from another package: built, installed and found through its entry point; every failure to load is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamkv.errors import ConfigError
from streamkv.runner.logits_processor import PROCESSORS, ProcessorSetup, load_processors
from tests.runner.sampling_oracle import Row, random_logits, sampling, tables

DOCS = Path(__file__).parents[2] / "docs" / "sampling.md"
LIMIT_S = 120
SETUP = ProcessorSetup(num_rows=8, vocab_size=50, device=torch.device("cpu"), model_path=Path())

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "only-multiples"
version = "1.0"
{entry_points}
[tool.hatch.build.targets.wheel]
packages = ["only_multiples"]
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)


def example() -> dict[str, Any]:
    """The processor of docs/sampling.md, as it stands there."""
    names: dict[str, Any] = {"__name__": "only_multiples"}
    exec(compile(blocks("python")[0], str(DOCS), "exec"), names)
    return names


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has built and installed the example of the docs; nothing is fetched."""
    folder = tmp_path_factory.mktemp("third-party")
    source = folder / "source"
    (source / "only_multiples").mkdir(parents=True)
    (source / "only_multiples" / "__init__.py").write_text(blocks("python")[0])
    (source / "pyproject.toml").write_text(PROJECT.format(entry_points=blocks("toml")[0]))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", source]
    subprocess.run(command, check=True, timeout=LIMIT_S, cwd=folder)
    return folder / "site"


def test_it_is_found_by_its_name(installed: Path) -> None:
    code = """
import json, pathlib, torch, only_multiples
from streamkv.runner.logits_processor import PROCESSORS, ProcessorSetup, load_processors
setup = ProcessorSetup(4, 50, torch.device("cpu"), pathlib.Path())
made = load_processors(["only_multiples"], setup)["only_multiples"]
print(json.dumps([only_multiples.__file__, type(made).__module__, sorted(PROCESSORS.available())]))
"""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=installed, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    file, module, names = json.loads(done.stdout)
    assert Path(file).is_relative_to(installed)
    assert module == "only_multiples"
    assert "only_multiples" in names


def test_the_example_does_what_it_says() -> None:
    made = example()["OnlyMultiples"](SETUP)
    asked = {"temperature": 0.0, "processors": (("only_multiples", 7),)}
    rows = [Row(sampling(temperature=0.0), [1], 1), Row(sampling(**asked), [1], 1), Row(sampling(**asked, top_k=3), [1, 2, 3], 1)]
    sampler = tables(rows, 50, processors={"only_multiples": made})
    for position in range(1, 6):
        logits = random_logits(position, 3, 50)
        tokens = sampler.sample(np.arange(3), np.array([position, position, position + 2]), logits)[0].tolist()
        allowed = logits[:, ::7].argmax(dim=-1) * 7
        assert tokens == [int(logits[0].argmax()), int(allowed[1]), int(allowed[2])]
        sampler.append(np.arange(3), tokens)
    for wrong in (0, -1, "7", None, True):
        with pytest.raises(ValueError, match="only_multiples takes an integer of at least 1"):
            made.check(wrong)
    made.check(7)


def test_processors_run_in_the_order_in_which_they_were_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "adding.py").write_text(
        "class Add:\n"
        "    def __init__(self, setup): self.amounts = {}\n"
        "    def check(self, arguments): ...\n"
        "    def admit(self, row, arguments, tokens, num_prompt): self.amounts[row] = arguments\n"
        "    def append(self, rows, tokens): ...\n"
        "    def apply(self, rows, logits):\n"
        "        return logits + logits.new_tensor([self.amounts[row] for row in rows.tolist()])[:, None]\n"
        "class Square(Add):\n"
        "    def apply(self, rows, logits): return logits * logits\n"
    )
    logits = torch.tensor([[-3.0, 1.0]])
    both = (("adding:Square", None), ("adding:Add", 2.0))
    asked = Row(sampling(temperature=0.0, processors=both), [1], 1)
    chosen = {}
    for names in (["adding:Add", "adding:Square"], ["adding:Square", "adding:Add"]):
        sampler = tables([asked], 2, processors=load_processors(names, SETUP))
        chosen[names[0]] = sampler.sample(np.array([0]), np.array([1]), logits)[0].tolist()
    assert chosen == {"adding:Add": [1], "adding:Square": [0]}


MODULES = {
    "proc_needs_missing": "import there_is_no_such_thing\n",
    "proc_broken": "from os import there_is_no_such_thing\n",
    "proc_odd": "number = 7\ndef raises(setup): raise RuntimeError('no licence')\n"
    "class Half:\n    def __init__(self, setup): ...\n"
    "    def apply(self, rows, logits): ...\n    check = None\n",
}

FAILURES = {
    "no_such_name": r"logits processor 'no_such_name' is unknown; use (one of .* or )?package\.module:Class",
    "no_such_package:Class": "there is no module no_such_package; install the package that has it",
    "proc_needs_missing:Class": "proc_needs_missing needs the module there_is_no_such_thing, which is not installed",
    "proc_broken:Class": "an import inside proc_broken failed",
    "proc_odd:Class": "proc_odd has no Class",
    "proc_odd:number": "is no class but an object of type int",
    "proc_odd:raises": r"cannot be made: RuntimeError\('no licence'\)",
    "proc_odd:Half": "is no streamkv.runner.logits_processor.LogitsProcessor: it lacks check, admit, append$",
    "proc_odd:": "names no class; the form is package.module:Class",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for module, code in MODULES.items():
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(code)
    with pytest.raises(ConfigError) as caught:
        load_processors([name], SETUP)
    assert caught.value.message.startswith(f"logits processor {name!r}")
    assert re.search(FAILURES[name], caught.value.message), caught.value.message
    assert "\n" not in caught.value.message


def test_none_is_loaded_unless_it_is_named() -> None:
    assert load_processors([], SETUP) == {}
    assert PROCESSORS.group == "streamkv.logits_processors"

"""A backend from another package: built, installed and found through its entry point; the engine runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import Sampling
from tests.backends.third_party.streamkv_pebble import PebbleBackend
from tests.engine.driving import run_all
from tests.runner.tiny import VOCAB, save_tiny

PACKAGE = Path(__file__).parent / "third_party"
LIMIT_S = 120


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has built and installed the package; nothing is fetched."""
    folder = tmp_path_factory.mktemp("third-party")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", source]
    subprocess.run(command, check=True, timeout=LIMIT_S, cwd=folder)
    return folder / "site"


def run(site: Path, *arguments: str) -> str:
    """What a Python that sees the installed package prints, away from this repository."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=site,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_is_found_by_its_name(installed: Path) -> None:
    code = """
import json, streamkv_pebble
from streamkv.backend_registry import available, load_backend
backend, reason = load_backend("pebble")
print(json.dumps([streamkv_pebble.__file__, type(backend).__module__, backend.name, reason, sorted(available())]))
"""
    file, module, name, reason, names = json.loads(run(installed, "-c", code))
    assert Path(file).is_relative_to(installed), "the installed package is used, not the sources"
    assert (module, name, reason) == ("streamkv_pebble", "pebble", "asked for by name 'pebble'")
    assert {"pebble", "torch"} <= set(names)


def test_it_keeps_the_contract(installed: Path) -> None:
    lines = run(installed, "-m", "streamkv_backends.contract", "pebble").splitlines()
    assert len(lines) > 100
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"{len(lines) - 1} checks, 0 failed"


async def test_the_engine_computes_the_same_on_it(tmp_path: Path) -> None:
    prompts = [[(7 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((1, 15, 16, 17, 40))]
    requests = [EngineRequest((f"r{i}",), prompt, Sampling(max_tokens=8, temperature=0.0)) for i, prompt in enumerate(prompts)]
    tokens = {}
    save_tiny(tmp_path)
    for backend in ("torch", f"{PebbleBackend.__module__}:PebbleBackend"):
        config = EngineConfig(
            str(tmp_path), backend=backend, num_blocks=40, block_size=8, max_num_seqs=8, max_num_batched_tokens=24, poison=True
        )
        async with build_engine(config) as engine:
            tokens[backend] = {name: done.tokens for name, done in (await run_all(engine, requests)).items()}
    first, second = tokens.values()
    assert first == second
    assert all(len(sequence) == 8 for sequence in first.values())

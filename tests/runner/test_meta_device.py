"""Models are made without torch's compiler, and come out as they would with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamkv.runner import loader
from streamkv.runner.loader import load_model
from streamkv.runner.meta_device import computing_off_meta
from tests.runner.families import FAMILIES, MORE, build

LIMIT_S = 120

WITHOUT_COMPILER = ("Llama, rope yarn", "Llama, rope longrope", "Gemma 2", "GPT-2", "GPT-OSS", "Qwen3-MoE")
"""Families that differ in what they compute while they are made."""
MIXED = "Gemma 4 (text)"
"""Joins frequencies that were counted with zeros that were not."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("model") for name in (*WITHOUT_COMPILER, MIXED)}
    for name, folder in made.items():
        build((FAMILIES | MORE)[name], folder)
    return made


LOAD = """
import json, sys
from pathlib import Path
from streamkv.runner.imports import COMPILER, import_transformers
import_transformers()
from streamkv.runner.loader import load_model
for folder in json.loads(sys.argv[1]):
    load_model(Path(folder))
    assert COMPILER not in sys.modules, folder
    assert "sympy" not in sys.modules, folder
"""


def test_loading_does_not_import_the_compiler(folders: dict[str, Path]) -> None:
    chosen = json.dumps([str(folders[name]) for name in WITHOUT_COMPILER])
    done = subprocess.run([sys.executable, "-c", LOAD, chosen], check=False, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*WITHOUT_COMPILER, MIXED])
def test_the_model_is_the_same_as_if_it_was_made_plainly(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers above all: a table of positions that nobody computed would show in every answer and in no check."""
    spared = load_model(folders[name]).module
    monkeypatch.setattr(loader, "computing_off_meta", lambda make: make())
    plain = load_model(folders[name]).module
    assert tensors(spared).keys() == tensors(plain).keys()
    for where, tensor in tensors(spared).items():
        assert torch.equal(tensor, tensors(plain)[where]), where


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def on_meta() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        return nn.Linear(3, 3), torch.arange(0, 6, 2), torch.tensor(0.5), torch.tensor([])


def test_only_small_tensors_with_values_leave_the_meta_device() -> None:
    linear, counted, scale, empty = computing_off_meta(on_meta)
    assert linear.weight.is_meta
    assert counted.tolist() == [0, 2, 4]
    assert scale.item() == 0.5
    assert empty.is_meta  # how transformers asks where it is


def test_real_tensors_are_filled_as_ever() -> None:
    def make() -> torch.Tensor:
        torch.manual_seed(0)
        return nn.init.normal_(torch.empty(4))

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(computing_off_meta(make), make())


def test_what_mixes_devices_is_made_again_plainly() -> None:
    made: list[bool] = []

    def make() -> torch.Tensor:
        with torch.device("meta"):
            counted = torch.arange(3)
            made.append(counted.is_meta)
            return torch.cat((counted, torch.zeros(3)))

    assert computing_off_meta(make).is_meta
    assert made == [False, True]


def test_other_failures_are_not_tried_twice() -> None:
    calls: list[Any] = []

    def make() -> None:
        calls.append(None)
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        computing_off_meta(make)
    assert len(calls) == 1

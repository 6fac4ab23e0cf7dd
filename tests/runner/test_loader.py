"""Model folders: what is loaded, and what is refused with one sentence before transformers or torch touches it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamkv.attention import LayerSpec
from streamkv.errors import ModelLoadError
from streamkv.runner.loader import load_model
from tests.runner.tiny import VOCAB, save_tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.smoke
def test_a_folder_is_loaded_and_described(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    model = load_model(folder)
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (VOCAB, 512, (3, 5))
    assert model.dtype is torch.float32
    assert model.layers == (LayerSpec(4, 2, 32, 32**-0.5),) * 3
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_dtype_can_be_chosen_and_auto_takes_what_the_folder_declares(folder: Path) -> None:
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16
    edit(folder, dtype="float16")
    assert load_model(folder).dtype is torch.float16
    with pytest.raises(ModelLoadError, match="dtype 'int8' is unknown"):
        load_model(folder, dtype="int8")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_what_the_weights_are_stored_in_where_nothing_is_declared(folder: Path, stored: torch.dtype) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).dtype is stored


def test_dtype_by_its_old_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype is torch.bfloat16
    edit(folder, torch_dtype="float64")
    assert load_model(folder, dtype="float32").dtype is torch.float32, "what is asked for counts"


def test_dummy_weights_need_no_weights_come_from_the_seed_and_leave_the_generator_alone(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    state = torch.get_rng_state()
    first, again, other = (load_model(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.module.state_dict()[name], again.module.state_dict()[name])
    assert not torch.equal(first.module.state_dict()[name], other.module.state_dict()[name])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_other_weights_have_another_fingerprint(folder: Path) -> None:
    before = load_model(folder).fingerprint
    assert load_model(folder).fingerprint == before
    assert load_model(folder, dtype="bfloat16").fingerprint != before
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).fingerprint != before


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_pickled_weights_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_a_tensor_more(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.1.mlp.up_proj.bias": torch.zeros(192)}, folder / "model.safetensors", {"format": "pt"})


def with_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    # What the validator refuses is in test_folder.py.
    "code by auto_map": (lambda folder: edit(folder, auto_map={"AutoModel": "x.Y"}), "sets 'auto_map'"),
    "pickled weights": (with_pickled_weights_only, "only pytorch_model.bin"),
    "another architecture": (lambda folder: edit(folder, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "unknown model type": (lambda folder: edit(folder, model_type="martian"), "transformers refuses"),
    "heads that do not divide": (lambda folder: edit(folder, rope_parameters="big"), "transformers refuses"),
    "a tensor is missing": (without_a_tensor, "lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight"),
    "a tensor too many": (
        with_a_tensor_more,
        "hold 1 tensors that .* no place for, the first is model.layers.1.mlp.up_proj.bias",
    ),
    "weights are cut": (cut, "is cut or has bytes"),
    "weights of another shape": (
        lambda folder: edit(folder, intermediate_size=64),
        r"do not fit its config.json: model.layers.0.mlp.down_proj.weight is \(128, 192\) and should be \(128, 64\)",
    ),
    "integers for weights": (with_integers, "model.layers.1.mlp.up_proj.weight in .* holds I8; quantised weights are not served"),
    "made for a dtype that is not served": (lambda folder: edit(folder, dtype="float64"), "made for dtype 'float64'.*--dtype"),
    "a dtype that there is not": (lambda folder: edit(folder, dtype="martian"), "transformers refuses"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_folder_is_refused_in_one_sentence(folder: Path, case: str) -> None:
    spoil, sentence = REFUSED[case]
    spoil(folder)
    with pytest.raises(ModelLoadError, match=sentence) as raised:
        load_model(folder)
    assert "\n" not in raised.value.message

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


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is no model folder"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "configuration is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "configuration is a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
    "configuration is nested too deep": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "cannot be read as JSON",
    ),
    "code by auto_map": (lambda folder: edit(folder, auto_map={"AutoModel": "x.Y"}), "sets 'auto_map'"),
    "code nested in the configuration": (lambda folder: edit(folder, text={"auto_map": {}}), "runs no code"),
    "attention chosen by the folder": (lambda folder: edit(folder, _attn_implementation_internal="x/y"), "runs no code"),
    "Python beside the weights": (lambda folder: (folder / "modeling.py").write_text(""), "holds Python files"),
    "pickled weights": (with_pickled_weights_only, r"holds no \*.safetensors"),
    "another architecture": (lambda folder: edit(folder, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not served"),
    "no architecture": (lambda folder: edit(folder, architectures=None), "an unnamed architecture is not served"),
    "unknown model type": (lambda folder: edit(folder, model_type="martian"), "transformers refuses"),
    "a size that is text": (lambda folder: edit(folder, hidden_size="big"), "transformers refuses"),
    "rope that depends on the batch": (
        lambda folder: edit(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope type 'dynamic'",
    ),
    "a tensor is missing": (without_a_tensor, "lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight"),
    "weights are cut": (cut, "do not fit its config.json"),
    "weights of another shape": (lambda folder: edit(folder, intermediate_size=64), "do not fit its config.json"),
    "generation configuration is no JSON": (
        lambda folder: (folder / "generation_config.json").write_text("nope"),
        "generation_config.json cannot be read",
    ),
    "end token is text": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "must be an integer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_folder_is_refused_in_one_sentence(folder: Path, case: str) -> None:
    spoil, sentence = REFUSED[case]
    spoil(folder)
    with pytest.raises(ModelLoadError, match=sentence) as raised:
        load_model(folder)
    assert "\n" not in raised.value.message

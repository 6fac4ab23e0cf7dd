"""Weights mapped from their files: the state that transformers itself would load, in no more memory than the weights take."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from streamkv.errors import ModelLoadError
from streamkv.runner import loader
from streamkv.runner.folder import check_folder
from streamkv.runner.weights import MappedWeights
from tests.runner.tiny import save_tiny

SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
FAMILIES: dict[str, Any] = {
    "Llama": transformers.LlamaConfig(**GROUPED),
    "Llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "Gemma2": transformers.Gemma2Config(**GROUPED, head_dim=16),
    "Phi3": transformers.Phi3Config(**(GROUPED | {"pad_token_id": 0})),
    "GPT2": transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "GPTNeoX": transformers.GPTNeoXConfig(**SMALL),
    "Mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "GPT-OSS": transformers.GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4),
}


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    module.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_is_that_of_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str) -> None:
    monkeypatch.setattr(loader, "_rewrite", lambda *_: {})
    folder = save(tmp_path, FAMILIES[family], shard="100KB")
    ours = loader.load_model(folder, dtype=dtype)
    assert len(check_folder(folder, weights=True).weight_files) > 1
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    expected, state = theirs.state_dict(), ours.module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype is tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert (ours.module.get_output_embeddings().weight is ours.module.get_input_embeddings().weight) is tied


def test_large_tensors_lie_in_their_files_and_small_ones_do_not(tmp_path: Path) -> None:
    folder = save(tmp_path, FAMILIES["Llama"])
    model = loader.load_model(folder)
    large = sum(p.numel() * 4 for p in model.module.parameters() if p.numel() * 4 >= 64 * 1024)
    assert large <= model.mapped_bytes <= large + 10 * mmap.ALLOCATIONGRANULARITY
    assert loader.load_model(folder, dtype="float16").mapped_bytes == 0, "what was converted is no longer mapped"
    assert loader.load_model(folder, load_format="dummy").mapped_bytes == 0


def test_pages_given_back_come_again_as_they_were(tmp_path: Path) -> None:
    save_tiny(tmp_path, hidden_size=256)
    weights = MappedWeights(check_folder(tmp_path, weights=True).tensors)
    tensors = {name: lazy[...] for name, lazy in weights.state_dict().items()}
    expected = load_file(tmp_path / "model.safetensors")
    assert weights.mapped_bytes > 0
    for _ in range(2):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        weights.untouch()
    tensors.clear()
    assert weights.mapped_bytes == 0, "a mapping ends with its tensor"


def test_a_tensor_at_an_odd_place_and_an_empty_one(tmp_path: Path) -> None:
    save_file({"flag": torch.ones(3, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    header = json.dumps({
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [100, 300], "data_offsets": [3, 120_003]},
        "c": {"dtype": "F32", "shape": [0, 5], "data_offsets": [120_003, 120_003]},
    }).encode()  # fmt: skip
    values = torch.arange(30_000, dtype=torch.float32).view(100, 300)
    data = bytes(3) + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (tmp_path / "config.json").write_text("{}")
    tensors = MappedWeights(check_folder(tmp_path, weights=True).tensors).state_dict()
    assert torch.equal(tensors["b"][...], values)
    assert tensors["b"][...].data_ptr() % 4 == 0, "copied to an even place"
    assert tensors["c"][...].shape == (0, 5)
    with pytest.raises(ModelLoadError, match=r"a in .* holds U8"):
        tensors["a"][...]


def test_a_file_that_has_become_shorter_is_no_crash(tmp_path: Path) -> None:
    save_tiny(tmp_path, hidden_size=256)
    weights = MappedWeights(check_folder(tmp_path, weights=True).tensors)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="cannot be mapped into memory"):
        weights.state_dict()["lm_head.weight"][...]


def test_long_reads_tell_how_far_they_are(tmp_path: Path) -> None:
    save_tiny(tmp_path, hidden_size=256)
    weights = MappedWeights(check_folder(tmp_path, weights=True).tensors)
    ticks = iter(range(0, 1000, 3))
    with capture_logs() as logs:
        weights.read_through(clock=lambda: float(next(ticks)))
    told = [entry["bytes"] for entry in logs if entry["event"] == "reading_weights"]
    assert told == sorted(told)
    assert len(told) >= 1
    assert logs[-1]["event"] == "weights_read"
    assert logs[-1]["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_loading_uses_no_thread_pool_and_leaves_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", lambda *_, **__: pytest.fail("a pool of threads"))
    loader.load_model(folder)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in loader.os.environ  # type: ignore[attr-defined]  # imported there


@pytest.mark.parametrize("case", range(3), ids=["float32", "bfloat16, tied", "float32 to bfloat16"])
def test_peak_memory_is_that_of_the_weights_and_not_twice(tmp_path: Path, case: int) -> None:
    from benchmarks.loading import QUICK, build, measure  # not there beside an installed wheel

    figures = measure(build(tmp_path, QUICK[case]), QUICK[case], "engine")
    assert figures.weights > 70_000_000
    # The bound of 1.3 times the weights and 400 MB allows for libraries, whose part differs by build. This is loading's own part.
    assert figures.peak - figures.base <= 1.3 * figures.weights + 40_000_000

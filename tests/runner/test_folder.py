"""The validator of model folders: hostile ones, each refused in a sentence before any library sees a file, and good ones."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from streamkv.errors import ModelLoadError
from streamkv.hub import ALLOWED
from streamkv.runner import loader
from streamkv.runner.bounded_json import parse_object, walk
from streamkv.runner.config_check import BOUNDS, FORBIDDEN_KEYS
from streamkv.runner.folder import CAPS, PICKLES, check_folder
from streamkv.runner.safetensors_header import read_header
from tests.runner.hostile import HOSTILE, WEIGHTS, edit, good, header, link, put, templates, tensor, write

MAX_SECONDS = 2.0
MAX_BYTES = 100_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good(tmp_path / "model")


def test_the_corpus_is_large_and_what_it_spoils_is_good(folder: Path) -> None:
    assert len(HOSTILE) >= 80
    assert [(entry.name, entry.shape, entry.num_bytes) for entry in check_folder(folder, weights=True).tensors] == [
        ("a", (8,), 32),
        ("b", (8,), 32),
    ]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_before_any_library_sees_it(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    for name in ("AutoConfig", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "MappedWeights", "torch", "register"):
        monkeypatch.delattr(loader, name)
    spoil, sentence = HOSTILE[case]
    spoil(folder)
    before = time.process_time()
    with pytest.raises(ModelLoadError, match=sentence) as raised:
        loader.load_model(folder)
    assert time.process_time() - before < MAX_SECONDS
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 500 + 2 * len(str(folder))


def test_refusing_takes_little_memory(tmp_path: Path) -> None:
    for index, (spoil, _) in enumerate(HOSTILE.values()):
        folder = good(tmp_path / str(index) / "model")
        spoil(folder)
        tracemalloc.start()
        with pytest.raises(ModelLoadError):
            check_folder(folder, weights=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_BYTES, list(HOSTILE)[index]
        shutil.rmtree(tmp_path / str(index))


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        with pytest.raises(ModelLoadError, match="is no model folder"):
            check_folder(path, weights=True)


def test_a_folder_of_a_million_files_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamkv.runner.folder._MAX_ENTRIES", 3)
    with pytest.raises(ModelLoadError, match="holds more than 3 files"):
        check_folder(good(tmp_path / "model"), weights=True)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root, which tests may run as, can read everything

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelLoadError, match="cannot be read: Permission denied"):
        check_folder(folder, weights=True)


FINE = {
    "pickles beside safetensors, which nothing opens": put("pytorch_model.bin", b"\x80\x04."),
    "pickles of a training": put("training_args.bin", b"\x80\x04."),
    "keys without a value": edit("config.json", auto_map=None, quantization_config=None, attn_implementation=None),
    "a flag of transformers 4.46 to 4.52": edit("config.json", _attn_implementation_autoset=True),
    "a file that nobody reads": link("README.md", "/etc/passwd"),
    "a link inside": link("merges.txt", "tokenizer.json"),
    "a token that is called like a setting": put("added_tokens.json", {"auto_map": 5}),
    "sizes by layer": edit("config.json", intermediate_size=[16, 32], num_key_value_heads=[1, 2]),
    "several ending tokens": edit("config.json", eos_token_id=[1, 2], pad_token_id=-1),
    "a sub-folder": lambda folder: (folder / "original").mkdir(),
    "several templates": templates(default=b"x", tools=b"y"),
    "a vocabulary whose words are like settings": put("vocab.json", {"auto_map": 0}),
}


@pytest.mark.parametrize("case", FINE)
def test_what_real_folders_hold_is_let_through(folder: Path, case: str) -> None:
    FINE[case](folder)
    assert check_folder(folder, weights=True).config["model_type"] == "llama"


def test_weights_are_not_asked_for_where_none_are_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert check_folder(folder, weights=False).tensors == ()


def test_a_single_file_is_preferred_to_an_index_as_transformers_does(folder: Path) -> None:
    write(folder, "model.safetensors.index.json", {"weight_map": {"z": "z.safetensors"}})
    assert {entry.name for entry in check_folder(folder, weights=True).tensors} == {"a", "b"}


def test_the_hubs_cache_is_the_one_place_that_links_may_lead_to(tmp_path: Path) -> None:
    repository = tmp_path / "models--tiny--llama"
    folder = good(repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    (folder / "model.safetensors").rename(repository / "blobs" / "f00d")
    link("model.safetensors", "../../blobs/f00d")(folder)
    assert len(check_folder(folder, weights=True).tensors) == 2
    inside = tmp_path / "shortcut"
    inside.symlink_to(folder)
    assert len(check_folder(inside, weights=True).tensors) == 2, "the folder itself may be a link"
    (tmp_path / "secret").write_bytes(WEIGHTS)
    link("model.safetensors", "../../../secret")(folder)
    with pytest.raises(ModelLoadError, match="leaves the folder"):
        check_folder(folder, weights=True)


@pytest.mark.parametrize("key", BOUNDS)
def test_bounds_are_exact(folder: Path, key: str) -> None:
    low, high = BOUNDS[key]
    config = json.loads((folder / "config.json").read_text())
    for value in (low, high):
        write(folder, "config.json", config | {key: value})
        check_folder(folder, weights=False)
    for value in (low - 1, high * 2, "1", True, [low - 1], {}):
        write(folder, "config.json", config | {key: value})
        with pytest.raises(ModelLoadError, match=f"sets {key} to"):
            check_folder(folder, weights=False)


# -- as transformers writes them --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, Any] = {
    "Llama": transformers.LlamaConfig(**SMALL),
    "Mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=1),
    "Qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
    "Gemma2": transformers.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8),
    "Gemma3": transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8),
    "Phi3": transformers.Phi3Config(**SMALL, pad_token_id=0),
    "GPT2": transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    "GPTNeoX": transformers.GPTNeoXConfig(**SMALL),
    "OPT": transformers.OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2),
    "Granite": transformers.GraniteConfig(**SMALL),
    "Mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2),
    "GptOss": transformers.GptOssConfig(**SMALL, num_key_value_heads=1, head_dim=8, num_local_experts=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_writes_is_let_through(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family]
    module = transformers.AutoModelForCausalLM.from_config(config)
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    text = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=text, unk_token="<unk>").save_pretrained(tmp_path)
    folder = check_folder(tmp_path, weights=True)
    assert len(folder.weight_files) > 1
    assert sum(entry.num_bytes for entry in folder.tensors) > 10_000
    assert folder.config["model_type"] == config.model_type


# -- any bytes --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_bounded_json_reads_what_json_reads(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode(), "it", max_nodes=1000) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), "it", max_nodes=1000) == value
    assert {key for key, _ in walk(value, "it")} >= value.keys()


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    with suppress(ModelLoadError):
        assert isinstance(parse_object(data, "it", max_nodes=100), dict)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4), st.integers(-4, 4))
def test_a_header_is_believed_exactly_if_its_tensors_fill_the_file(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], more: int
) -> None:
    entries, end = {}, 0
    for index, shape in enumerate(shapes):
        begin, end = end, end + 4 * shape[0] * shape[1]
        entries[str(index)] = tensor(begin, end, shape)
    size = max(0, end + more)
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    file.write_bytes(header(entries, bytes(size)))
    if size == end:
        assert [entry.shape for entry in sorted(read_header(file), key=lambda entry: entry.name)] == shapes
    else:
        with pytest.raises(ModelLoadError, match="is cut or has bytes"):
            read_header(file)


# -- docs/loading.md --------------------------------------------------------------------------------------------------


def test_the_page_names_every_bound() -> None:
    page = (Path(__file__).parents[2] / "docs" / "loading.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for key, reason in FORBIDDEN_KEYS.items():
        assert any(f"`{key}`" in row and row.endswith(f"| {reason} |") for row in rows), key
    for key, bounds in BOUNDS.items():
        low, high = (f"{value:g}" if isinstance(value, float) else f"{value:,}" for value in bounds)
        assert any(f"`{key}`" in row and row.endswith(f"| {low} | {high} |") for row in rows), key
    for name, most in CAPS.items():
        unit, size = next((unit, 2**power) for unit, power in (("TiB", 40), ("MiB", 20), ("KiB", 10)) if most % 2**power == 0)
        assert f"| `{name}` | {most // size} {unit} |" in rows
    for word in (*PICKLES, *ALLOWED):
        assert f"`{word}`" in page

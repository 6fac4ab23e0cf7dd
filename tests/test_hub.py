"""Models by hub id, against a hub on loopback: what is fetched, what is found in the cache, what is said when neither works."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import streamkv.hub
from streamkv.engine.config import EngineConfig
from streamkv.errors import ConfigError, ModelLoadError
from streamkv.hub import fetch, is_hub_id, resolve_model
from streamkv.runner.loader import load_model
from tests.hub_server import BROKEN, GATED, OTHER_SHA, REPO, SHA, Hub, serving
from tests.runner.tiny import VOCAB, save_tiny

WANTED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "tokenizer.model",
    "merges.txt",
}
UNWANTED = {
    "README.md",
    "pytorch_model.bin",
    "modeling_tiny.py",
    "requirements.txt",
    "consolidated.safetensors",
    "onnx/config.json",
    "original/tokenizer.model",
    "docs/page.jinja",
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {name: name.encode() for name in WANTED | UNWANTED} | written  # equal contents would be fetched once


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(files) as hub:
        yield hub


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_only_weights_settings_and_tokenizer_are_fetched_and_the_snapshot_is_served(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(REPO, endpoint=hub.url, cache_dir=tmp_path)
    assert folder.name == SHA
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()} == WANTED
    assert set(hub.downloaded) == WANTED
    assert (folder / "model.safetensors").is_symlink(), "the layout whose links the validator allows"
    assert load_model(folder).vocab_size == VOCAB


def test_what_is_in_the_cache_is_not_fetched_again_and_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    first = fetch(REPO, endpoint=hub.url, cache_dir=tmp_path)
    hub.downloaded.clear()
    assert fetch(REPO, endpoint=hub.url, cache_dir=tmp_path) == first
    assert hub.downloaded == []
    assert fetch(REPO, endpoint=f"http://127.0.0.1:{closed_port()}", cache_dir=tmp_path) == first


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    assert fetch(REPO, "main", endpoint=hub.url, cache_dir=tmp_path).name == SHA
    assert fetch(REPO, "v1", endpoint=hub.url, cache_dir=tmp_path).name == OTHER_SHA
    assert fetch(REPO, OTHER_SHA, endpoint=hub.url, cache_dir=tmp_path).name == OTHER_SHA


@pytest.mark.parametrize(
    ("repo", "revision", "sentence"),
    [
        ("tiny/lama", None, "neither a folder here nor a model at .*check the name"),
        (GATED, None, "is gated: accept its terms at .*/tiny/gated and give a token in HF_TOKEN"),
        (REPO, "v9", "has no branch, tag or commit 'v9'"),
        (BROKEN, None, "complete in the cache .* cannot be reached"),
        ("tiny/" + "x" * 200, None, r"cannot be fetched from .* \(HFValidationError\)"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_sentence(
    hub: Hub, tmp_path: Path, repo: str, revision: str | None, sentence: str
) -> None:
    with pytest.raises(ModelLoadError, match=sentence) as raised:
        fetch(repo, revision, endpoint=hub.url, cache_dir=tmp_path)
    assert "\n" not in raised.value.message


def test_without_network_and_not_in_the_cache_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match=f"neither a folder here nor complete in the cache {tmp_path}.*HF_HOME"):
        fetch(REPO, endpoint=f"http://127.0.0.1:{closed_port()}", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="neither a folder here nor complete in the cache"):
        fetch(REPO, cache_dir=tmp_path)


def test_a_snapshot_that_lacks_a_file_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(REPO, endpoint=hub.url, cache_dir=tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="nor complete in the cache"):
        fetch(REPO, endpoint=f"http://127.0.0.1:{closed_port()}", cache_dir=tmp_path)
    assert (fetch(REPO, endpoint=hub.url, cache_dir=tmp_path) / "model.safetensors").exists()


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("tiny/llama")
    (tmp_path / "tiny" / "llama").mkdir(parents=True)
    assert not is_hub_id("tiny/llama")
    assert resolve_model("tiny/llama") == Path("tiny/llama")
    with pytest.raises(ConfigError, match="is a folder and has no revisions"):
        resolve_model("tiny/llama", "main")


@pytest.mark.parametrize(
    "model", ["llama", "./tiny/llama", "/tiny/llama", "a/b/c", "~/llama", "../llama", "tiny/", "", "tiny/la ma"]
)
def test_what_cannot_be_an_id_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streamkv.hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    if model:
        with pytest.raises(ModelLoadError, match="is no folder, and no id"):
            resolve_model(model)
    assert not is_hub_id(model)


def test_engine_and_tokenizer_get_the_same_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    snapshots = iter(["first", "the branch has moved"])
    monkeypatch.setattr(streamkv.hub, "fetch", lambda *_: Path(next(snapshots)))
    streamkv.hub._fetch_once.cache_clear()
    config = EngineConfig(model="tiny/moving", revision="main")
    assert config.model_path == config.model_path == Path("first")
    assert config.model_name == "tiny/moving"
    streamkv.hub._fetch_once.cache_clear()
    with pytest.raises(ConfigError, match="revision needs a model"):
        EngineConfig(revision="main")

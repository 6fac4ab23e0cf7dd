"""A model folder, checked before transformers, torch or tokenizers sees any file of it: what may lie there, and how large.

Whoever can write to the folder while it is being read can still replace a file after its check. That is out of scope: who
may write there may as well replace the weights.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamkv.errors import ModelLoadError
from streamkv.runner.bounded_json import parse_object, read_file, walk
from streamkv.runner.config_check import LAYER_COUNTS, check_bounds, check_keys, check_tokenizer
from streamkv.runner.safetensors_header import TensorEntry, read_header

__all__ = ["CAPS", "PICKLES", "ModelFolder", "check_folder"]

_KIB, _MIB = 1024, 1024 * 1024

CAPS: Final = {
    "config.json": _MIB,
    "generation_config.json": 256 * _KIB,
    "tokenizer.json": 64 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "*.index.json": 32 * _MIB,
    "vocab.json": 64 * _MIB,
    "*.json": 16 * _MIB,
    "*.jinja": 256 * _KIB,
    "*.model": 32 * _MIB,
    "merges.txt": 64 * _MIB,
    "vocab.txt": 64 * _MIB,
    "*.safetensors": 2**40,
}
"""Name -> most bytes; the first line that fits holds. A file that fits none is read by nobody and not looked at."""

PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npz", ".npy", ".joblib", ".gguf")
"""Weights in formats that are not loaded. Beside safetensors they are left alone: nothing opens them."""

_MAX_VALUES: Final = 500_000
_MAX_TOKENIZER_VALUES: Final = 4_000_000  # a quarter of a million pieces and half a million merges of two make two million
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json")
_NOT_SETTINGS: Final = (*_VOCABULARIES, "added_tokens.json")  # their keys are any text
_MAX_ENTRIES: Final = 10_000
_MAX_TEMPLATES: Final = 32

_TEMPLATES: Final = "additional_chat_templates"
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What has been read and found good.

    Attributes:
        config: config.json.
        generation_config: generation_config.json, empty if there is none.
        tensors: where every tensor of the weights lies; empty if they were not asked for.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: tuple[TensorEntry, ...]

    @property
    def weight_files(self) -> list[Path]:
        """In the order of their names."""
        return sorted({tensor.file for tensor in self.tensors})


def check_folder(path: Path, *, weights: bool) -> ModelFolder:
    """Read and check everything but the tensors themselves.

    Args:
        weights: whether there must be weights.

    Raises:
        ModelLoadError: one sentence what is wrong and, where it helps, what to do.
    """
    names = _names(path)
    if "config.json" not in names:
        raise ModelLoadError(f"{path} is no model folder: it has no config.json")
    _refuse_foreign(path, names, weights=weights)
    objects = {name: _read(path, name) for name in sorted(names) if _cap(name) is not None}
    config = objects["config.json"] or {}
    check_bounds(config, path / "config.json")
    if tokenizer := objects.get("tokenizer.json"):
        check_tokenizer(tokenizer, path / "tokenizer.json")
    generation = objects.get("generation_config.json") or {}
    check_bounds(generation, path / "generation_config.json")
    _check_templates(objects, path)
    tensors = _tensors(path, names, objects.get(_INDEX)) if weights else ()
    if weights:
        _check_depth(config, len(tensors), path)
    return ModelFolder(path, config, generation, tensors)


def _check_depth(config: dict[str, Any], num_tensors: int, path: Path) -> None:
    """Every layer has a tensor: building a thousand layers takes a minute, and only then would the weights be missed."""
    counts = [value for key, value in walk(config, path) if key in LAYER_COUNTS and isinstance(value, int)]
    if max(counts, default=0) > num_tensors:
        raise ModelLoadError(f"{path}/config.json promises {max(counts)} layers and the weights hold {num_tensors} tensors")


def _names(path: Path) -> set[str]:
    try:
        with os.scandir(path) as entries:
            names = {entry.name for entry, _ in zip(entries, range(_MAX_ENTRIES + 1), strict=False)}
    except OSError as error:
        raise ModelLoadError(f"{path} is no model folder: {error.strerror}") from error
    if len(names) > _MAX_ENTRIES:
        raise ModelLoadError(f"{path} is no model folder: it holds more than {_MAX_ENTRIES} files")
    return names


def _refuse_foreign(path: Path, names: set[str], *, weights: bool) -> None:
    """Code, adapters, and weights that are not safetensors."""
    if any(name.endswith((".py", ".pyc", ".so")) for name in names):
        raise ModelLoadError(f"{path} holds Python files; StreamKV runs no code from a model folder, remove them")
    if "adapter_config.json" in names:
        raise ModelLoadError(f"{path} is an adapter; merge it into its model and serve the result")
    if weights and not names & {_SINGLE, _INDEX}:
        other = sorted(name for name in names if name.endswith((*PICKLES, ".safetensors")))
        found = f", only {other[0]}; convert it with transformers' save_pretrained" if other else ""
        raise ModelLoadError(f"{path} holds no {_SINGLE} and no {_INDEX}{found}")


def _cap(name: str) -> int | None:
    return next(
        (cap for pattern, cap in CAPS.items() if name == pattern or (pattern[0] == "*" and name.endswith(pattern[1:]))), None
    )


def _read(path: Path, name: str) -> dict[str, Any] | None:
    """Check a file's kind and size, and the keys of a JSON file; the object in it, if it is one that is used here."""
    file, cap = path / name, _cap(name)
    assert cap is not None
    try:
        status = file.stat()
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelLoadError(f"{file} is no regular file")
    if not _stays(path, file):
        raise ModelLoadError(f"{file} is a link that leaves the folder; copy the file to its place")
    if status.st_size > cap:
        raise ModelLoadError(f"{file} is larger than {cap} bytes, the most that is read of such a file")
    if not name.endswith(".json"):
        return None
    most = _MAX_TOKENIZER_VALUES if name in _VOCABULARIES else _MAX_VALUES
    value = parse_object(read_file(file, cap), file, max_nodes=most)
    if name not in _NOT_SETTINGS:
        check_keys(value, file)
    return value


def _stays(path: Path, file: Path) -> bool:
    """Inside the folder, or in the hub's cache: `models--x/snapshots/<sha>/file -> ../../blobs/<hash>`."""
    folder, target = path.resolve(), file.resolve()
    if target.is_relative_to(folder):
        return True
    repository = folder.parent.parent
    return folder.parent.name == "snapshots" and repository.name.startswith("models--") and target.parent == repository / "blobs"


def _check_templates(objects: dict[str, dict[str, Any] | None], path: Path) -> None:
    """Those in the settings, and those in the one sub-folder that is read."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        templates = (objects.get(name) or {}).get("chat_template")
        named = templates if isinstance(templates, list) else [templates]
        texts = [entry.get("template") if isinstance(entry, dict) else entry for entry in named]
        if len(texts) > _MAX_TEMPLATES or any(isinstance(text, str) and len(text) > CAPS["*.jinja"] for text in texts):
            raise ModelLoadError(
                f"{path}/{name} has a chat template of more than {CAPS['*.jinja']} characters, or more than {_MAX_TEMPLATES}"
            )
    if (path / _TEMPLATES).is_dir():
        files = sorted(name for name in _names(path / _TEMPLATES) if name.endswith(".jinja"))
        if len(files) > _MAX_TEMPLATES:
            raise ModelLoadError(f"{path}/{_TEMPLATES} holds more than {_MAX_TEMPLATES} chat templates")
        for name in files:
            _read(path, f"{_TEMPLATES}/{name}")


def _tensors(path: Path, names: set[str], index: dict[str, Any] | None) -> tuple[TensorEntry, ...]:
    """Of the single file, as transformers prefers it, or of every file that the index names."""
    if _SINGLE in names:
        return tuple(read_header(path / _SINGLE))
    where = path / _INDEX
    placed = (index or {}).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ModelLoadError(f"{where} has no weight_map from tensors to files")
    for shard in sorted(set(placed.values())):
        if not shard.endswith(".safetensors") or "/" in shard or "\\" in shard or shard.startswith("."):
            raise ModelLoadError(f"{where} names {shard[:100]!r}, which is no *.safetensors in the folder")
        if shard not in names:
            raise ModelLoadError(f"{where} names {shard[:100]!r}, which is missing; fetch it again")
    tensors = [tensor for shard in sorted(set(placed.values())) for tensor in read_header(path / shard)]
    found = {tensor.name: tensor.file.name for tensor in tensors}
    if len(found) < len(tensors):
        raise ModelLoadError(f"the files named by {where} hold a tensor twice")
    if found != placed:
        name = min(name for name in found.keys() | placed.keys() if found.get(name) != placed.get(name))
        raise ModelLoadError(f"{where} and the files that it names disagree about tensor {name[:100]!r}")
    return tuple(tensors)

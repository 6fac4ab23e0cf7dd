"""From a model folder to a module that the runner can drive: safetensors only, no code from the folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from streamkv.attention import LayerSpec
from streamkv.errors import ModelLoadError
from streamkv.runner.architecture import check_architecture, pin_rope, probe_layers
from streamkv.runner.hook import HOOK_NAME, register
from streamkv.runner.packed_linear import pack_linears

__all__ = ["LoadedModel", "load_model"]

_FORBIDDEN_KEYS: Final = ("auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation")
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LoadFormat = Literal["safetensors", "dummy"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be driven.

    Attributes:
        module: transformers' own causal language model, attention hooked, on `device`, not training.
        layers: what each attention layer needs, seen in a probe run.
        max_model_len: what its position embedding was made for.
        vocab_size: width of the logits.
        eos_token_ids: ids that end its output.
        fingerprint: SHA-256 of configuration and weight files' headers; equal KV needs equal fingerprints.
    """

    module: Any
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load_model(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    load_format: LoadFormat = "safetensors",
    max_model_len: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a folder in Hugging Face's layout.

    Args:
        path: folder with config.json and, unless `load_format` is `dummy`, *.safetensors.
        dtype: `auto` takes what the folder declares.
        max_model_len: most tokens of a request, which rope tables are fixed for; None = what the model was made for.
        seed: of the random weights of `dummy`.

    Raises:
        ModelLoadError: one sentence what is wrong with the folder.
    """
    check_folder(path, weights=load_format == "safetensors")
    register()
    config = _read_config(path)
    architecture = check_architecture(config)
    torch_dtype = _resolve_dtype(config, dtype)
    target = torch.device(device)
    module = _dummy(config, torch_dtype, seed) if load_format == "dummy" else _from_safetensors(path, config, torch_dtype)
    module = module.to(target).eval().requires_grad_(False)
    pin_rope(module, config, max_model_len)
    layers = probe_layers(module, config, target)
    model = LoadedModel(
        module=module,
        layers=layers,
        dtype=torch_dtype,
        device=target,
        max_model_len=int(config.max_position_embeddings),
        vocab_size=int(module.get_output_embeddings().weight.shape[0]),
        eos_token_ids=_eos_ids(path, config),
        fingerprint=_fingerprint(path, torch_dtype, seed if load_format == "dummy" else None),
    )
    count = sum(parameter.numel() for parameter in module.parameters())
    packed = pack_linears(module)  # last: it takes the plain weights away
    log.info(
        "model_loaded", architecture=architecture, parameters=count, dtype=str(torch_dtype), layers=len(layers), packed=packed
    )
    return model


def _read_config(path: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise many kinds
        log.exception("config_refused", path=str(path))
        raise ModelLoadError(f"transformers refuses {path}/config.json; the log says why") from error


def check_folder(path: Path, *, weights: bool) -> None:
    """Refuse a folder before transformers reads any of it.

    Raises:
        ModelLoadError: not a model folder, no safetensors, or it asks for its own code to be run.
    """
    config_file = path / "config.json"
    if not path.is_dir() or not config_file.is_file():
        raise ModelLoadError(f"{path} is no model folder: it has no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}/config.json cannot be read as JSON") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path}/config.json must hold a JSON object")
    _refuse_code(config, "config.json")
    if any(path.glob("*.py")):
        raise ModelLoadError(f"{path} holds Python files; StreamKV runs no code from a model folder")
    if weights and not any(path.glob("*.safetensors")):
        raise ModelLoadError(f"{path} holds no *.safetensors; other weight formats are not loaded")


def _refuse_code(value: object, where: str) -> None:
    """Look through nested objects for keys that make transformers run foreign code."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if any(key.startswith(forbidden) for forbidden in _FORBIDDEN_KEYS):
                raise ModelLoadError(f"{where} sets {key!r}; StreamKV runs no code named by a model folder")
            _refuse_code(inner, f"{where}: {key}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(inner, where)


def _resolve_dtype(config: PretrainedConfig, dtype: str) -> torch.dtype:
    if dtype == "auto":
        declared = config.dtype
        return declared if isinstance(declared, torch.dtype) and declared in _DTYPES.values() else torch.float32
    if dtype not in _DTYPES:
        raise ModelLoadError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _from_safetensors(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    transformers_logging.set_verbosity_error()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=HOOK_NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, torch and safetensors raise kinds of their own
        log.exception("model_load_failed", path=str(path))
        raise ModelLoadError(f"the weights in {path} do not fit its config.json") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills what is missing with random numbers; that is never what anyone wants served.
        raise ModelLoadError(f"the weights in {path} lack {len(missing)} tensors, the first is {missing[0]}")
    return module


def _dummy(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> Any:
    """Random weights of the right shapes; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=HOOK_NAME, trust_remote_code=False)


def _eos_ids(path: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """generation_config.json overrules config.json, as in `generate`."""
    value: object = config.eos_token_id
    generation = path / "generation_config.json"
    if generation.is_file():
        try:
            value = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id", value)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ModelLoadError(f"{generation} cannot be read as a JSON object") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelLoadError(f"eos_token_id of {path} must be an integer or a list of integers")
    return tuple(ids)


def _fingerprint(path: Path, dtype: torch.dtype, seed: int | None) -> str:
    """Identify the weights without reading gigabytes: configuration, and every file's header, size and name."""
    digest = hashlib.sha256(f"{dtype} {seed}".encode())
    digest.update((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
            digest.update(stream.read(min(length, 100_000_000)))
    return digest.hexdigest()

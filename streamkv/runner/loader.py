"""From a checked model folder to a module that the runner can drive.

The module, its key renames and merges (experts into one tensor, say) are transformers' own; the tensors are ours: transformers
gets a state dict of lazy ones and opens no file but config.json. Peak resident memory is that of the weights as they are
computed with, plus one tensor: see `streamkv.runner.weights`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from streamkv.attention import LayerSpec
from streamkv.errors import ConfigError, ModelLoadError
from streamkv.fused import FusedOps, Quantization
from streamkv.runner.angle_table import tabulate_angles
from streamkv.runner.architecture import attention_implementation, check_architecture, max_positions, pin_rope, probe_layers
from streamkv.runner.folder import ModelFolder, check_folder
from streamkv.runner.hook import register
from streamkv.runner.meta_device import computing_off_meta
from streamkv.runner.packed_linear import pack_linear
from streamkv.runner.rewrite import rewrite
from streamkv.runner.weights import MappedWeights

__all__ = ["LoadedModel", "load_model"]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_THREADS: Final = "HF_DEACTIVATE_ASYNC_LOAD"
_STORED: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

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
        mapped_bytes: weights that are used where they lie in their files. The system counts them as page cache, which is free
            to be given away; whoever shares out its free memory must not.
    """

    module: Any
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    mapped_bytes: int = 0


def load_model(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    load_format: LoadFormat = "safetensors",
    max_model_len: int | None = None,
    seed: int = 0,
    ops: FusedOps | None = None,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load a folder in Hugging Face's layout.

    Args:
        path: folder with config.json and, unless `load_format` is `dummy`, *.safetensors.
        dtype: `auto` takes what the folder declares.
        max_model_len: most tokens of a request, which rope tables are fixed for; None = what the model was made for.
        seed: of the random weights of `dummy`.
        ops: fused functions of the backend that will attend.
        quantization: of the weights of linear layers, by `ops`.

    Raises:
        ModelLoadError: one sentence what is wrong with the folder.
        ConfigError: the backend cannot compute with weights that are quantised like that.
    """
    began = time.monotonic()
    folder = check_folder(path, weights=load_format == "safetensors")
    _quieten_transformers()
    register()
    config = _read_config(path)
    architecture = check_architecture(config)
    torch_dtype = _resolve_dtype(config, dtype, folder)
    target = torch.device(device)
    weights = MappedWeights(folder.tensors)
    if load_format == "dummy":
        module = _dummy(config, torch_dtype, seed, target)
    else:
        module = _from_weights(folder, weights, config, torch_dtype)
    module = module.to(target).eval().requires_grad_(False)
    pin_rope(module, config, max_model_len)
    layers = probe_layers(module, config, target)
    vocab_size = int(module.get_output_embeddings().weight.shape[0])
    count = sum(parameter.numel() for parameter in module.parameters())
    fused = None if ops is None else ops.of(torch_dtype)
    if quantization is not None and fused is None:
        raise ConfigError(f"quantization {quantization} needs the cpu backend and --dtype bfloat16", param="quantization")
    rewritten = _rewrite(module, weights, fused, quantization)  # last: it takes the plain weights away
    rewritten["angles"] = tabulate_angles(module, max_model_len or max_positions(config), torch_dtype)
    model = LoadedModel(
        module=module,
        layers=layers,
        dtype=torch_dtype,
        device=target,
        max_model_len=max_positions(config),
        vocab_size=vocab_size,
        eos_token_ids=_eos_ids(folder, config),
        fingerprint=_fingerprint(folder, f"{torch_dtype} {quantization}", seed if load_format == "dummy" else None),
        mapped_bytes=weights.mapped_bytes,
    )
    log.info(
        "model_loaded",
        architecture=architecture,
        parameters=count,
        dtype=str(torch_dtype),
        layers=len(layers),
        rewritten=dict(rewritten),
        mapped_bytes=model.mapped_bytes,
        seconds=round(time.monotonic() - began, 2),
    )
    return model


def _quieten_transformers() -> None:
    """Its bars and warnings would stand between the lines of the log, and what matters in them is told as an error here."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _read_config(path: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise many kinds
        log.exception("config_refused", path=str(path))
        raise ModelLoadError(f"transformers refuses {path}/config.json; the log says why") from error


def _resolve_dtype(config: PretrainedConfig, dtype: str, folder: ModelFolder) -> torch.dtype:
    """The asked one; else what the configuration declares; else what most of the weights are stored in."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelLoadError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    declared = getattr(config.get_text_config(), "dtype", None) or config.dtype
    if declared is None:
        sizes: Counter[str] = Counter()
        for tensor in folder.tensors:
            sizes[tensor.dtype] += tensor.num_bytes
        declared = _STORED.get(sizes.most_common(1)[0][0] if sizes else "F32")
    if declared not in _DTYPES.values():
        stated = str(declared).removeprefix("torch.")
        raise ModelLoadError(
            f"{folder.path} is made for dtype {stated!r}, which is not served; give --dtype {' or '.join(_DTYPES)}"
        )
    return declared  # type: ignore[no-any-return]  # one of `_DTYPES`


def _from_weights(folder: ModelFolder, weights: MappedWeights, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The module with its tensors.

    Raises:
        ModelLoadError: tensors are missing, left over or of another shape.
    """

    def make() -> Any:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,  # no folder: neither adapters nor other files that it would look for there
            config=config,
            state_dict=weights.state_dict(),
            dtype=dtype,
            attn_implementation=attention_implementation(config),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )

    weights.read_through()
    try:
        with _in_this_thread():
            module, report = computing_off_meta(make)
    except Exception as error:  # transformers and torch raise kinds of their own
        if weights.refused is not None:
            raise weights.refused from error
        log.exception("model_load_failed", path=str(folder.path))
        raise ModelLoadError(f"the weights in {folder.path} do not fit its config.json; the log says why") from error
    _check_report(report, folder.path)
    return module


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Keep transformers from a pool of threads: torch runs in the runner's only, and four conversions at once are four copies."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


def _check_report(report: dict[str, Any], path: Path) -> None:
    """What transformers would only warn of, having filled gaps with random numbers. Nobody wants that served."""
    if mismatched := sorted((name, tuple(found), tuple(asked)) for name, found, asked in report["mismatched_keys"]):
        name, found, asked = mismatched[0]
        raise ModelLoadError(f"the weights in {path} do not fit its config.json: {name} is {found} and should be {asked}")
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(f"the weights in {path} lack {len(missing)} tensors, the first is {missing[0]}")
    if unexpected := sorted(report["unexpected_keys"]):
        raise ModelLoadError(
            f"the weights in {path} hold {len(unexpected)} tensors that its config.json has no place for, "
            f"the first is {unexpected[0]}"
        )


def _rewrite(module: nn.Module, weights: MappedWeights, ops: FusedOps | None, quantization: Quantization | None) -> Counter[str]:
    """Make the module fast; see `streamkv.runner.rewrite`."""
    weights.untouch()  # the probe read everything

    def pack(linear: nn.Linear) -> nn.Module | None:
        packed = (ops.linear(linear, quantization) if ops is not None else None) or pack_linear(linear)
        weights.untouch()  # what was read for it
        return packed

    return rewrite(module, ops, pack)


def _dummy(config: PretrainedConfig, dtype: torch.dtype, seed: int, device: torch.device) -> Any:
    """Random weights of the right shapes, drawn where they will be; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_implementation(config), trust_remote_code=False
        )


def _eos_ids(folder: ModelFolder, config: PretrainedConfig) -> tuple[int, ...]:
    """generation_config.json overrules config.json, as in `generate`; their values are checked integers."""
    value: Any = folder.generation_config.get("eos_token_id", config.eos_token_id)
    return tuple(value if isinstance(value, list) else [] if value is None else [value])


def _fingerprint(folder: ModelFolder, dtype: str, seed: int | None) -> str:
    """Identify the weights without reading gigabytes: configuration, and every file's header, size and name."""
    digest = hashlib.sha256(f"{dtype} {seed}".encode())
    digest.update((folder.path / "config.json").read_bytes())
    for file in folder.weight_files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
    return digest.hexdigest()

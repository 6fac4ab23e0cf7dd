"""What a model must be to be served, told before and after its weights are loaded: one sentence for everything that is not."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import PretrainedConfig

from streamkv.attention import LayerSpec
from streamkv.errors import ModelLoadError
from streamkv.runner.hook import Probe

__all__ = ["SERVED_ARCHITECTURES", "check_architecture", "pin_rope", "probe_layers"]

SERVED_ARCHITECTURES: Final = frozenset({"LlamaForCausalLM"})
"""Families with a parity test; everything else is refused by name."""


def check_architecture(config: PretrainedConfig) -> str:
    """The architecture's name, if a configuration shows no reason against it.

    Raises:
        ModelLoadError: one sentence that names the architecture and the reason.
    """
    architecture: str = (config.architectures or ["an unnamed architecture"])[0]
    if architecture not in SERVED_ARCHITECTURES:
        raise ModelLoadError(f"{architecture} is not served; served are {', '.join(sorted(SERVED_ARCHITECTURES))}")
    # Rope tables are fixed at load; types that depend on the running batch's length would mix requests.
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelLoadError(f"rope type {kind!r} depends on the length of what runs beside it and is not supported")
    return architecture


def pin_rope(module: Any, config: PretrainedConfig, max_model_len: int | None) -> None:
    """Fix rope tables that would follow the length of the running batch for requests of up to `max_model_len` tokens."""


def probe_layers(module: Any, config: PretrainedConfig, device: torch.device) -> tuple[LayerSpec, ...]:
    """What each attention layer asks for, seen in one forward pass.

    Raises:
        ModelLoadError: the layers do not go through transformers' attention interface, or ask for what the hook lacks.
    """
    probe = Probe()
    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.inference_mode():
        module(input_ids=ids, position_ids=ids, use_cache=False, streamkv_context=probe)
    if sorted(probe.layers) != list(range(len(probe.layers))) or not probe.layers:
        raise ModelLoadError("the model's attention layers do not go through transformers' attention interface")
    return tuple(probe.layers[index] for index in range(len(probe.layers)))

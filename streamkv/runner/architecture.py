"""What a model must be to be served, told before its weights are read where its configuration shows it, else after.

There is no list of names: `arch_needs` is the table of what the hook needs, this file asks a configuration, `arch_probe` asks
the loaded module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from streamkv.attention import LayerSpec
from streamkv.runner.arch_needs import refuse
from streamkv.runner.arch_probe import probe_module
from streamkv.runner.arch_rope import pin_rope_tables
from streamkv.runner.hook import HOOK_NAME, attach, uses_interface

__all__ = ["attention_implementation", "check_architecture", "max_positions", "pin_rope", "probe_layers"]

_SERVED_LAYERS: Final = {"full_attention", "sliding_attention"}
_RECURRENT: Final = ("linear_attention", "conv", "mamba", "recurrent", "hybrid")
"""Words in names of layer types that keep a state."""
_PLAIN_POSITIONS: Final = {None, "absolute", "rope", "rotary", "learned", "nope"}


def check_architecture(config: PretrainedConfig) -> str:
    """The architecture's name, if a configuration shows no reason against it.

    Raises:
        ModelLoadError: one sentence that names the architecture and the reason.
    """
    architecture: str = (config.architectures or ["an unnamed architecture"])[0]
    for check in _CHECKS:
        check(config, architecture)
    return architecture


def attention_implementation(config: PretrainedConfig) -> str:
    """What to load the module with; `probe_layers` attaches the hook where transformers cannot do it itself."""
    return HOOK_NAME if uses_interface(_class_of(config)) else "eager"


def max_positions(config: PretrainedConfig) -> int:
    """Most tokens of a sequence that the model was made for.

    Raises:
        ModelLoadError: the configuration does not tell.
    """
    for name in ("max_position_embeddings", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return refuse("length", (config.architectures or [type(config).__name__])[0])


def pin_rope(module: Any, config: PretrainedConfig, max_model_len: int | None) -> None:
    """Fix rope tables that would follow the length of the running batch for requests of up to `max_model_len` tokens.

    Raises:
        ModelLoadError: tables for that length would depend on the running sequence.
    """
    pin_rope_tables(module, max_model_len or max_positions(config))


def probe_layers(module: Any, config: PretrainedConfig, device: torch.device) -> tuple[LayerSpec, ...]:
    """Attach the hook; then what each attention layer asks for, seen in a few forward passes over a few tokens.

    Raises:
        ModelLoadError: the layers do not go through transformers' attention interface, or ask for what the hook lacks.
    """
    attach(module)
    return probe_module(module, max_positions(config), device)


def _class_of(config: PretrainedConfig) -> Any:
    """The class that transformers would make, or None."""
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001  # the table has no public name
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def _check_class(config: Any, architecture: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        refuse("decoder_only", architecture, what="it has an encoder")
    found = _class_of(config)
    known = "no causal language model" if found is None else found.__name__
    if known != architecture:
        refuse("class", architecture, known=known, model_type=config.model_type)


def _check_text(config: Any, architecture: str) -> None:
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    models = [name for name in parts if "num_attention_heads" in vars(getattr(config, name))]  # MPT has parts that are no models
    if config.get_text_config(decoder=True) is not config or models:
        refuse("text", architecture, parts=", ".join(parts))


def _check_decoder(config: Any, architecture: str) -> None:
    if getattr(config, "add_cross_attention", False):
        refuse("decoder_only", architecture, what="it attends to an encoder")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        refuse("decoder_only", architecture, what="it is an encoder, whose tokens see what comes after them")


def _check_interface(config: Any, architecture: str) -> None:
    found = _class_of(config)
    if found._is_stateful:  # noqa: SLF001  # transformers' own declaration, without a public name
        refuse("stateless", architecture, what="declared by its class")
    if not uses_interface(found) and not any(hasattr(member, "_attn") for member in _same_file(found).values()):
        refuse("interface", architecture)


def _same_file(cls: type) -> dict[str, Any]:
    """What is defined in the file of a class, by name."""
    return vars(sys.modules[cls.__module__])


def _check_layer_types(config: Any, architecture: str) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS)
    recurrent = [kind for kind in others if any(word in kind for word in _RECURRENT)]
    if recurrent:
        refuse("stateless", architecture, what=", ".join(recurrent))
    if others:
        refuse("layer_types", architecture, what=", ".join(others))
    if getattr(config, "num_kv_shared_layers", None):
        refuse("own_kv", architecture)


def _check_positions(config: Any, architecture: str) -> None:
    alibi = getattr(config, "alibi", getattr(getattr(config, "attn_config", None), "alibi", None))  # Falcon, MPT
    if alibi is None:  # no choice: Bloom's file has a function that makes the bias
        found = _class_of(config)
        alibi = not uses_interface(found) and any("alibi" in name for name in _same_file(found))
    if alibi:
        refuse("no_alibi", architecture, what="ALiBi")
    kind = getattr(config, "position_embedding_type", None)
    if kind not in _PLAIN_POSITIONS:
        refuse("no_alibi", architecture, what=str(kind))


_CHECKS: Final[tuple[Callable[[Any, str], None], ...]] = (
    _check_class,
    _check_text,
    _check_decoder,
    _check_layer_types,
    _check_positions,
    _check_interface,
)

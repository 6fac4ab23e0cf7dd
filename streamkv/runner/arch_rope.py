"""Rope tables that transformers would recompute from the longest sequence of the running batch, fixed once at load."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamkv.runner.arch_needs import refuse

__all__ = ["pin_rope_tables"]

_PINNED: Final = "pinned"
"""Takes the place of the type's name in the rope module, whose forward pass then recomputes nothing."""


def pin_rope_tables(module: Any, length: int) -> None:
    """Fix every table below `module` for requests of up to `length` tokens.

    `dynamic` (NTK) equals the plain table up to the length that the model was made for; longer requests are not served.
    `longrope` has two tables. The short one is taken if no request can be longer than the original length, else the long one,
    for short requests too: a sequence that grows keeps its keys, and they were turned by one table only (vLLM does the same).

    Raises:
        ModelLoadError: the table for `length` tokens would depend on the running sequence.
    """
    for rope in module.modules():
        kinds = getattr(rope, "rope_type", None)
        if isinstance(kinds, str):
            if _pin(module, rope, None, kinds, length):
                rope.rope_type = _PINNED
        elif isinstance(kinds, dict):  # one table per type of layer (Gemma 3)
            pinned = {layer_type for layer_type, kind in kinds.items() if _pin(module, rope, layer_type, kind, length)}
            rope.rope_type = kinds | dict.fromkeys(pinned, _PINNED)


def _pin(module: Any, rope: Any, layer_type: str | None, kind: str, length: int) -> bool:
    """Set one table; whether there was anything to fix. Names as in transformers' `dynamic_rope_update`."""
    if "dynamic" in kind:
        if length > rope.original_max_seq_len:
            refuse("rope", module, kind=kind, length=rope.original_max_seq_len)
        return True  # the table made at start is the one for every shorter length
    if kind != "longrope":
        return False
    prefix = f"{layer_type}_" if layer_type else ""
    parameters = rope.config.rope_parameters
    original = (parameters[layer_type] if layer_type else parameters)["original_max_position_embeddings"]
    table: torch.Tensor = getattr(rope, f"{prefix}inv_freq")
    if length > original:
        options = {"layer_type": layer_type} if layer_type else {}
        long, _ = ROPE_INIT_FUNCTIONS[kind](rope.config, table.device, seq_len=original + 1, **options)
        table.copy_(long)
    else:
        table.copy_(getattr(rope, f"{prefix}original_inv_freq"))
    return True

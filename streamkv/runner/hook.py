"""The one place where transformers' attention becomes ours.

transformers calls the function registered under an attention implementation's name from every attention layer, with queries and
keys already rotated. Ours writes k and v into the paged pool and attends over blocks; the mask function says "no mask",
because the backend knows who may see whom. The packed batch is [1, num_tokens] with explicit positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from streamkv.attention import AttentionBackend, LayerSpec
from streamkv.errors import ModelLoadError

__all__ = ["HOOK_NAME", "KVContext", "Probe", "register"]

HOOK_NAME: Final = "streamkv"


@dataclass(slots=True)
class KVContext:
    """Travels through `model(**kwargs)` to every attention layer. Owner: the runner, which sets `metadata` once a step."""

    backend: AttentionBackend
    metadata: Any = None

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, heads, num_tokens, head_dim] in, [1, num_tokens, heads, head_dim] out."""
        output = self.backend.attend(
            query[0].transpose(0, 1),  # [num_tokens, num_heads, head_dim]
            key[0].transpose(0, 1),  # [num_tokens, num_kv_heads, head_dim]
            value[0].transpose(0, 1),
            module.layer_idx,  # type: ignore[arg-type]  # every attention module of transformers has it
            self.metadata,
            kwargs.get("s_aux"),
        )
        return output[None]


@dataclass(slots=True)
class Probe:
    """Stands in for a KVContext in one forward pass and writes down what each layer asks for."""

    layers: dict[int, LayerSpec] = field(default_factory=dict)

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Record the layer's shapes and options; attends to nothing but each token itself."""
        index: int = module.layer_idx  # type: ignore[assignment]  # every attention module of transformers has it
        if query.shape[-1] != value.shape[-1]:
            raise ModelLoadError(f"layer {index} has keys and values of different width, which is not supported")
        if not getattr(module, "is_causal", True):
            raise ModelLoadError(f"layer {index} is not causal: only decoder models can be served")
        scaling = kwargs.get("scaling")
        self.layers[index] = LayerSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            window=kwargs.get("sliding_window"),
            soft_cap=kwargs.get("softcap"),
            has_sinks=kwargs.get("s_aux") is not None,
        )
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    streamkv_context: KVContext | Probe,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None, "a mask was built although the hook asks for none"
    return streamkv_context.attend(module, query, key, value, **kwargs), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def register() -> None:
    """Make `attn_implementation=HOOK_NAME` known to transformers. Idempotent."""
    AttentionInterface.register(HOOK_NAME, _attention)
    AttentionMaskInterface.register(HOOK_NAME, _no_mask)

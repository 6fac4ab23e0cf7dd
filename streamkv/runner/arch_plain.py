"""Attention as it is written in a textbook, in float32: what a model is probed with, so that no backend has a say in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from streamkv.attention import LayerSpec

__all__ = ["PlainPool", "hidden_from", "softmax_attention"]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, spec: LayerSpec, sinks: Tensor | None) -> Tensor:
    """Attend as `spec` says; the new tokens are the last ones of the context.

    Args:
        query: [num_heads, new, head_dim].
        key: [num_kv_heads, context, head_dim].
        value: [num_kv_heads, context, head_dim].
        spec: scale, window, soft-cap.
        sinks: [num_heads] or None.

    Returns:
        [new, num_heads, head_dim], contiguous, the dtype of `query`.
    """
    group = spec.num_heads // spec.num_kv_heads
    keys, values = key.float().repeat_interleave(group, dim=0), value.float().repeat_interleave(group, dim=0)
    scores = query.float() @ keys.transpose(1, 2) * spec.scale  # [num_heads, new, context]
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    scores = scores.masked_fill(hidden_from(query.shape[1], key.shape[1], spec.window, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]]
    return (weights @ values).transpose(0, 1).to(query.dtype).contiguous()


def hidden_from(new: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """[new, context], True where a token may not look."""
    position = torch.arange(context - new, context, device=device)[:, None]
    other = torch.arange(context, device=device)[None]
    return (other > position) | (other <= position - (window or context))


@dataclass(slots=True)
class PlainPool:
    """Context of a packed pass: keeps the keys and values of each sequence, as a paged pool does.

    Attributes:
        layers: what each layer asks for.
        parts: name, first and end row of each sequence of the coming pass; set before it.
    """

    layers: tuple[LayerSpec, ...]
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    _kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, **_kwargs: Any) -> None:
        """None, as in the runner."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Sequence by sequence, each over what was kept of it and what is new."""
        index: int = module.layer_idx  # type: ignore[assignment]  # seen in the survey
        outputs = []
        for name, start, end in self.parts:
            keys, values = key[0, :, start:end], value[0, :, start:end]
            if (index, name) in self._kept:
                before = self._kept[index, name]
                keys, values = torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)
            self._kept[index, name] = keys, values
            outputs.append(softmax_attention(query[0, :, start:end], keys, values, self.layers[index], kwargs.get("s_aux")))
        return torch.cat(outputs)[None]

"""What is right: the definition of attention, the size of an error, and how a fault is raised."""

from __future__ import annotations

import torch

from streamkv.attention import LayerSpec

__all__ = ["attention", "relative_error", "require"]


def require(condition: bool, sentence: str) -> None:
    """Raise AssertionError with `sentence` unless `condition`; unlike the statement it also works under `python -O`."""
    if not condition:
        raise AssertionError(sentence)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: LayerSpec,
    sinks: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention of one sequence's last tokens by its definition, every operation in `dtype`.

    Args:
        query: [new, num_heads, head_dim]; the last new token is the last of the context.
        key: [context, num_kv_heads, head_dim].
        value: [context, num_kv_heads, head_dim].
        spec: scale, window, soft-cap.
        sinks: [num_heads].
        dtype: float64 gives the reference, the case's own dtype gives "plain torch".

    Returns:
        [new, num_heads, head_dim] in `dtype`.
    """
    new, context = len(query), len(key)
    group = spec.num_heads // spec.num_kv_heads
    keys = key.to(dtype).repeat_interleave(group, dim=1)  # [context, num_heads, head_dim]
    values = value.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,chd->hnc", query.to(dtype), keys) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    token = torch.arange(context - new, context, device=query.device)[:, None]
    other = torch.arange(context, device=query.device)[None]
    visible = other <= token
    if spec.window is not None:
        visible &= other > token - spec.window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, new, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :context]
    return torch.einsum("hnc,chd->nhd", weights, values)


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, each head's vector measured by its own largest entry: a long context has small outputs."""
    size = exact.abs().amax(dim=-1, keepdim=True)
    return float(((output.double() - exact).abs() / size).max())

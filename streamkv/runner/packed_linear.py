"""Linear layers in bfloat16 on the CPU with weights packed for oneDNN once, at load.

`torch.nn.functional.linear` lays a weight out anew on every call; for the few rows of a decode step that costs as much as
the product. Packed once, the weight is read as it lies.
float32, other devices and builds of torch without oneDNN keep their modules, which are also the oracle in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["PackedLinear", "pack_linear"]


class PackedLinear(nn.Module):
    """Computes what the `nn.Linear` it was made from computes; inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        """Pack the weight. The plain weight is the caller's to drop."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001  # torch's compiler calls the same
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        packed = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")  # noqa: SLF001  # as above
        result: torch.Tensor = packed
        return result


def pack_linear(linear: nn.Linear) -> PackedLinear | None:
    """A packed copy of a layer whose weight can be packed, else None. The plain weight is the caller's to drop."""
    return PackedLinear(linear) if _can_pack(linear.weight) else None


def _can_pack(weight: torch.Tensor) -> bool:
    operators: Any = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
        and hasattr(operators, "_linear_pointwise")
        and operators._is_mkldnn_bf16_supported()  # noqa: SLF001  # torch's compiler asks the same
    )

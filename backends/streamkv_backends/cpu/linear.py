"""Linear layers whose weights are laid out once for the kernels (`kernels/linear.cpp`): bf16, or quantised to int8 or int4.

int8    one scale for each output channel, symmetric: 8 bits a weight
int4    a scale and a zero point for each 32 inputs of a channel: 4.5 bits a weight; the scale has 8 bits of its own
        (5 of exponent, 3 of mantissa) below one scale for the channel
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from streamkv.fused import Quantization
from streamkv_backends.cpu.native import Linear, Weight

__all__ = ["NativeLinear", "dequantize", "pack"]

_PANEL: Final = 64  # output channels
_STEP: Final = 32  # inputs; also an int4 group
_FORMATS: Final[dict[Quantization | None, int]] = {None: 0, "int8": 1, "int4": 2}
_STEP_BYTES: Final[dict[Quantization | None, int]] = {None: 4096, "int8": 2048, "int4": 1152}  # 32 inputs of a panel
_AT_ONCE: Final = 16 * _PANEL
_ROTATION: Final = 7
_LARGEST: Final = 1.875  # of the relative scales of int4: 1.111 in binary


def pack(weight: torch.Tensor, quantization: Quantization | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what the kernels read, scale of each output channel or None) of a weight [out_features, in_features].

    Some panels at a time: beside the weight and the result there is never a third copy of all of it.
    """
    channels, inputs = weight.shape
    size = -(-inputs // _STEP) * _STEP_BYTES[quantization]  # of a panel
    packed = torch.empty((-(-channels // _PANEL), size), dtype=torch.uint8)
    scales: list[torch.Tensor] = []
    for first in range(0, channels, _AT_ONCE):
        some = weight[first : first + _AT_ONCE]
        padded = weight.new_zeros((-(-len(some) // _PANEL) * _PANEL, -(-inputs // _STEP) * _STEP))
        padded[: len(some), :inputs] = some
        panels, scale = _PACKERS[quantization](padded)
        packed[first // _PANEL : first // _PANEL + len(panels)] = panels.view(len(panels), -1)
        scales += [] if scale is None else [scale]
    return packed, torch.cat(scales) if scales else None


def _pack_bf16(padded: torch.Tensor) -> tuple[torch.Tensor, None]:
    tiles = padded.bfloat16().view(len(padded) // _PANEL, 4, 16, padded.shape[1] // _STEP, 16, 2)
    steps = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()  # [panels, k / 32, 4 tiles, 16 pairs, 16 channels, 2]
    steps[:, 1::2] = steps[:, 1::2].roll(2, dims=2)
    return steps.view(torch.uint8), None


def _pack_int8(padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = _int8(padded.float())
    return _words(values), scale


def _pack_int4(padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales, zeros, scale = _int4(padded.float())
    nibbles = values.view(*values.shape[:-1], -1, 2)
    panels, groups = len(padded) // _PANEL, padded.shape[1] // _STEP
    head = torch.stack([_by_panel(scales), _by_panel(zeros)], dim=2).flatten(2)  # [panels, groups, 128]
    body = _words(nibbles[..., 0] | nibbles[..., 1] << 4).view(panels, groups, -1)
    return torch.cat([head, body], dim=2), scale


def _words(values: torch.Tensor) -> torch.Tensor:
    """Bytes [n, k] as words of four, panel by panel, rotated for the kernels."""
    words = _panels(values, 4).contiguous().numpy().view("<u4")
    return torch.from_numpy(((words << np.uint32(_ROTATION)) | (words >> np.uint32(32 - _ROTATION))).view(np.uint8))


def dequantize(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """What a quantised weight stands for, float32 [out_features, in_features]: the oracle of the tests."""
    channels, inputs = weight.shape
    padded = weight.new_zeros((channels, -(-inputs // _STEP) * _STEP)).float()
    padded[:, :inputs] = weight.float()
    if quantization == "int8":
        values, scale = _int8(padded)
        return ((values.float() - 128) * scale[:, None])[:, :inputs]
    values, scales, zeros, scale = _int4(padded)
    grouped = values.float().view(channels, -1, _STEP) - zeros.float()[..., None]
    return (grouped * _decoded(scales)[..., None] * scale[:, None, None]).flatten(1)[:, :inputs]


def _panels(values: torch.Tensor, width: int) -> torch.Tensor:
    """[n, k] -> [n / 64, k / width, 64, width]."""
    return values.view(-1, _PANEL, values.shape[1] // width, width).permute(0, 2, 1, 3)


def _by_panel(values: torch.Tensor) -> torch.Tensor:
    """[n, groups] -> [n / 64, groups, 64]."""
    return values.view(-1, _PANEL, values.shape[1]).transpose(1, 2)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values + 128, scale of each channel)."""
    scale = (weight.abs().amax(dim=1) / 127).clamp_(min=1e-30)
    return ((weight / scale[:, None]).round_() + 128).clamp_(1, 255).to(torch.uint8), scale


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values 0..15 [n, k], coded scales [n, groups], zero points [n, groups], scale of each channel [n])."""
    grouped = weight.view(len(weight), -1, _STEP)
    low, high = grouped.amin(dim=2).clamp_(max=0), grouped.amax(dim=2).clamp_(min=0)
    wanted = ((high - low) / 15).clamp_(min=1e-30)
    scale = wanted.amax(dim=1) / _LARGEST
    codes = _coded(wanted / scale[:, None])
    actual = _decoded(codes) * scale[:, None]
    zeros = (-low / actual).round_().clamp_(0, 15)
    values = ((grouped / actual[..., None]).round_() + zeros[..., None]).clamp_(0, 15)
    return values.to(torch.uint8).flatten(1), codes, zeros.to(torch.uint8), scale


def _coded(scales: torch.Tensor) -> torch.Tensor:
    """To the nearest 1.mmm · 2^(e - 31), as e · 8 + m."""
    mantissa, exponent = torch.frexp(scales)  # 0.5 <= mantissa < 1
    code = (exponent + 30) * 8 + ((mantissa * 2 - 1) * 8).round().to(exponent.dtype)
    return code.clamp_(0, 255).to(torch.uint8)


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    code = codes.int()
    return torch.ldexp(1 + (code & 7).float() / 8, (code >> 3) - 31)


_PACKERS: Final[dict[Quantization | None, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]]] = {
    None: _pack_bf16,
    "int8": _pack_int8,
    "int4": _pack_int4,
}


class NativeLinear(nn.Module):
    """Computes what the `nn.Linear` it was made from computes, in bfloat16; inference only. The plain weight is not kept."""

    def __init__(self, linear: nn.Linear, ops: Any, quantization: Quantization | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._ops = ops
        self._packed, scale = pack(linear.weight.detach(), quantization)
        self._scale = None if scale is None else scale.contiguous()
        self._bias: torch.Tensor | None = None
        if linear.bias is not None:
            self._bias = torch.zeros(-(-self.out_features // _PANEL) * _PANEL)
            self._bias[: self.out_features] = linear.bias.detach()
        self._weight = Weight(
            self._packed.data_ptr(),
            None if self._scale is None else self._scale.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.out_features,
            self.in_features,
            _FORMATS[quantization],
        )

    @property
    def num_bytes(self) -> int:
        """What the weight takes."""
        return self._packed.nbytes + (0 if self._scale is None else self._scale.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out: torch.Tensor = self._ops.empty((*x.shape[:-1], self.out_features), x.dtype)
        call = Linear(
            ctypes.addressof(self._weight), rows.data_ptr(), rows.stride(0), out.data_ptr(), self.out_features, len(rows), 0, None
        )
        self._ops.run_linear(call)
        return out

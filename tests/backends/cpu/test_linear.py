"""Packed linear layers against the modules they replace: every instruction set, format and odd shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from streamkv_backends.cpu.linear import NativeLinear, dequantize
from streamkv_backends.cpu.ops import CpuOps

SHAPES = [(64, 32), (100, 96), (1, 1), (65, 33), (130, 1100), (704, 256)]
FORMATS = [None, "int8", "int4"]


def layer(channels: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(channels * 1000 + inputs)
    return nn.Linear(inputs, channels, bias=bias, dtype=torch.bfloat16)


def rows(count: int, inputs: int) -> torch.Tensor:
    return torch.randn((1, count, inputs), generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_as_exact_as_torch(native: Any, shape: tuple[int, int], quantization: Any) -> None:
    plain = layer(*shape, bias=shape[0] % 2 == 0)
    meant = plain.weight if quantization is None else dequantize(plain.weight, quantization)
    packed = NativeLinear(plain, CpuOps(native), quantization)
    for count in (1, 2, 3, 5, 6, 7, 16, 17, 33, 130):
        given = rows(count, shape[1])
        exact = nn.functional.linear(given.double(), meant.double(), None if plain.bias is None else plain.bias.double())
        by_torch = nn.functional.linear(given, meant.bfloat16(), plain.bias).double()
        error = (packed(given).double() - exact).abs().max()
        allowed = (by_torch - exact).abs().max() + exact.abs().max() * 2**-8
        assert error <= 2 * allowed, count


@pytest.mark.parametrize("quantization", FORMATS)
@torch.inference_mode()
def test_a_row_depends_on_nothing_but_itself(native: Any, quantization: Any) -> None:
    packed = NativeLinear(layer(130, 200), CpuOps(native), quantization)
    given = rows(40, 200)
    whole = packed(given)
    for first, last in ((0, 1), (3, 5), (7, 24), (39, 40)):
        assert torch.equal(packed(given[:, first:last]), whole[:, first:last])
    spoiled = given.clone()
    spoiled[0, 9] = float("nan")
    spoiled[0, 20, 3] = float("inf")
    result = packed(spoiled)
    untouched = [row for row in range(40) if row not in (9, 20)]
    assert torch.equal(result[:, untouched], whole[:, untouched])
    assert result[0, 9].isnan().all()
    assert not result[0, 20].isfinite().any()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("shape", [(130, 1100), (600, 2816)], ids=str)  # few panels and many; the latter's rows come in blocks
@torch.inference_mode()
def test_many_rows_are_as_each_by_itself(native: Any, shape: tuple[int, int], quantization: Any) -> None:
    packed = NativeLinear(layer(*shape), CpuOps(native), quantization)
    given = rows(530, shape[1])
    whole = packed(given)
    for first, last in ((0, 16), (120, 165), (300, 364), (505, 530)):
        assert torch.equal(packed(given[:, first:last]), whole[:, first:last]), first


@torch.inference_mode()
def test_rows_with_gaps_between_them(native: Any) -> None:
    packed = NativeLinear(layer(70, 64), CpuOps(native), None)
    wide = rows(9, 128)
    assert torch.equal(packed(wide[..., :64]), packed(wide[..., :64].contiguous()))


@pytest.mark.parametrize(("quantization", "bits", "worst"), [("int8", 8, 0.005), ("int4", 4.5, 0.08)])
def test_rounding_is_as_small_as_its_bits_allow(native: Any, quantization: Any, bits: float, worst: float) -> None:
    plain = layer(256, 512)
    difference = (dequantize(plain.weight.detach(), quantization) - plain.weight.float()).abs()
    assert difference.max() <= worst * plain.weight.abs().max() * 2
    assert difference.square().mean().sqrt() <= worst * plain.weight.float().std()
    packed = NativeLinear(plain, CpuOps(native), quantization)
    assert packed.num_bytes <= 256 * 512 * bits / 8 + 4 * 256


def test_a_weight_of_zeros_stays_one(native: Any) -> None:
    plain = layer(64, 64)
    nn.init.zeros_(plain.weight)
    for quantization in FORMATS:
        assert not NativeLinear(plain, CpuOps(native), quantization)(rows(3, 64)).any()  # type: ignore[arg-type]  # from a list

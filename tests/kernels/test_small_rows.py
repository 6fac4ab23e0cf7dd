"""norm.cu, activation.cu and rotate.cu against float64 as exact as torch's own, and against torch bit by bit where it rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.rows import RowKernels
from tests.kernels.small import NAN, as_exact_as_torch, in_every_schedule, random, same_bits, spaced

BF16, F16 = torch.bfloat16, torch.float16
EPS = 1e-6


# -- norm -----------------------------------------------------------------------------------------------------------------


def llama(x: torch.Tensor, weight: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def gemma(x: torch.Tensor, weight: torch.Tensor, offset: float = 1.0) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (offset + weight.float())).to(x.dtype)


def olmo(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gemma(x, weight, 0.0)


STYLES: dict[str, tuple[Callable[..., torch.Tensor], float, bool]] = {
    "Llama": (llama, 0.0, True),
    "Gemma": (gemma, 1.0, False),
    "OLMo 2": (olmo, 0.0, False),
}


def rows_of(width: int, dtype: torch.dtype) -> torch.Tensor:
    """The last ones are so small that it matters on which side of the root eps stands, and that it is added at all."""
    parts = (random(5, width), random(3, width, scale=300.0, seed=1), random(3, width, scale=1e-3, seed=2))
    return torch.cat([part.float() for part in parts]).to(dtype)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (weight.double() + offset)


def rounds_as_torch(ours: torch.Tensor, by_torch: torch.Tensor) -> None:
    """Nearly all bits are equal: with a rounding more or less a fifth of the numbers would differ."""
    assert (ours == by_torch).float().mean() > 0.98


def norm_is_exact(device: EmulatedDevice, width: int, dtype: torch.dtype, style: str) -> None:
    by_torch, offset, round_first = STYLES[style]
    x, weight = rows_of(width, dtype), random(width, seed=3, dtype=dtype)
    out = RowKernels(device, dtype).rms_norm(x, weight, EPS, offset=offset, round_first=round_first)
    as_exact_as_torch(out, by_torch(x, weight), exact_norm(x, weight, offset))
    rounds_as_torch(out, by_torch(x, weight))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("width", "dtype"), [(16, BF16), (64, F16), (80, BF16), (1024, BF16), (1040, BF16), (2064, F16), (8192, BF16)]
)
def test_a_norm_is_as_exact_as_torch(plain: EmulatedDevice, width: int, dtype: torch.dtype, style: str) -> None:
    norm_is_exact(plain, width, dtype, style)


def norm_with_residual(device: EmulatedDevice, width: int) -> None:
    """The sum is torch's, bit by bit, and its norm is that of the sum."""
    x, residual, weight = random(7, width), random(7, width, seed=4), random(width, seed=5)
    summed = residual + x
    kernels = RowKernels(device, BF16)
    expected = kernels.rms_norm(summed, weight, EPS, offset=0.0, round_first=True)
    out = kernels.rms_norm(x, weight, EPS, offset=0.0, round_first=True, residual=residual)
    assert same_bits(residual, summed)
    assert same_bits(out, expected)


@pytest.mark.parametrize("width", [48, 1040])
def test_the_residual_is_added_and_normed(plain: EmulatedDevice, width: int) -> None:
    norm_with_residual(plain, width)


def norm_reads_strides(device: EmulatedDevice) -> None:
    """Heads of tokens within wider rows, as a merged product leaves them; and what no vector can read is copied."""
    weight, whole = random(64, seed=1), random(3, 5, 64)
    kernels = RowKernels(device, BF16)
    expected = kernels.rms_norm(whole, weight, EPS, offset=0.0, round_first=True)
    merged = torch.full((3, 7, 64), NAN, dtype=BF16)
    merged[:, 1:6] = whole
    shifted = torch.full((3, 5, 67), NAN, dtype=BF16)
    shifted[..., 3:] = whole
    transposed = whole.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (merged[:, 1:6], spaced(whole), shifted[..., 3:], transposed, whole.mT.contiguous().mT):
        assert same_bits(kernels.rms_norm(x, weight, EPS, offset=0.0, round_first=True), expected)


def test_rows_anywhere_give_the_same(plain: EmulatedDevice) -> None:
    norm_reads_strides(plain)


# -- gate -----------------------------------------------------------------------------------------------------------------


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": functional.silu, "gelu_tanh": gelu_tanh}


def gate_is_exact(device: EmulatedDevice, activation: str, dtype: torch.dtype, width: int) -> None:
    x = random(6, 2 * width, scale=4.0, dtype=dtype)
    x[0, :8] = torch.tensor([0.0, -0.0, 60.0, -60.0, 200.0, -200.0, 1e-3, -1e-3])
    act = ACTIVATIONS[activation]
    exact = act(x[:, :width].double()) * x[:, width:].double()
    ours = RowKernels(device, dtype).gate(x, activation)
    as_exact_as_torch(ours, act(x[:, :width]) * x[:, width:], exact)
    if activation == "silu":  # torch's GELU loses digits where it is nearly 0
        rounds_as_torch(ours, act(x[:, :width]) * x[:, width:])
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize(("activation", "dtype"), [("silu", BF16), ("silu", F16), ("gelu_tanh", BF16), ("gelu_tanh", F16)])
def test_a_gate_is_as_exact_as_torch(plain: EmulatedDevice, activation: str, dtype: torch.dtype) -> None:
    for width in (8, 48, 2056):  # less than a block, and a block and a bit
        gate_is_exact(plain, activation, dtype, width)


def gate_reads_strides(device: EmulatedDevice) -> None:
    x, kernels = random(2, 3, 64), RowKernels(device, BF16)
    expected = kernels.gate(x, "silu")
    assert expected.shape == (2, 3, 32)
    for other in (spaced(x), spaced(x, 3), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert same_bits(kernels.gate(other, "silu"), expected)


def test_a_gate_of_rows_anywhere_gives_the_same(plain: EmulatedDevice) -> None:
    gate_reads_strides(plain)


# -- rotary embedding -----------------------------------------------------------------------------------------------------


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotates_as_torch(device: EmulatedDevice, head_dim: int, dtype: torch.dtype) -> None:
    """Bit by bit: transformers' own arithmetic."""
    query, key = random(1, 5, 3, head_dim, dtype=dtype), random(1, 2, 3, head_dim, seed=1, dtype=dtype)
    cos, sin = random(1, 3, head_dim, seed=2, scale=0.7, dtype=dtype), random(1, 3, head_dim, seed=3, scale=0.7, dtype=dtype)
    expected = [x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (query, key)]
    kernels = RowKernels(device, dtype)
    views = (query.transpose(1, 2).contiguous().transpose(1, 2), key.transpose(1, 2).contiguous().transpose(1, 2))
    for given_query, given_key in ((query, key), views, (spaced(query), spaced(key, 3))):
        for ours, wanted in zip(kernels.rotate(given_query, given_key, cos, sin), expected, strict=True):
            assert torch.equal(ours, wanted)
            assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, BF16), (96, F16), (128, BF16), (256, BF16), (576, BF16)])
def test_rotation_is_torchs_bit_by_bit(plain: EmulatedDevice, head_dim: int, dtype: torch.dtype) -> None:
    rotates_as_torch(plain, head_dim, dtype)


# -- all -------------------------------------------------------------------------------------------------------------------


def rows_obey(device: EmulatedDevice) -> None:
    """One of each, for the checked build: no race, nothing out of range."""
    norm_with_residual(device, 1040)
    norm_with_residual(device, 48)
    gate_is_exact(device, "silu", BF16, 48)
    rotates_as_torch(device, 64, BF16)


def test_the_checked_build_finds_nothing(checked: EmulatedDevice) -> None:
    rows_obey(checked)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 1.0]))
def test_any_shape_in_any_schedule_gives_the_same_bits(
    plain: EmulatedDevice, rows: int, eighths: int, seed: int, offset: float
) -> None:
    x, weight = random(rows, 16 * eighths, seed=seed), random(16 * eighths, seed=seed + 1)
    results = [
        (
            RowKernels(one, BF16).rms_norm(x, weight, EPS, offset=offset, round_first=not offset),
            RowKernels(one, BF16).gate(x, "silu"),
        )
        for one in in_every_schedule(plain)
    ]
    assert all(same_bits(a, results[0][0]) and same_bits(b, results[0][1]) for a, b in results)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda k: k.rms_norm(random(2, 20), random(20), EPS, offset=0.0, round_first=True), "the last dimension of x is 20"),
        (lambda k: k.rms_norm(random(2, 16), random(24), EPS, offset=0.0, round_first=True), r"weight has the shape \[24\]"),
        (lambda k: k.rms_norm(random(2, 16).half(), random(16), EPS, offset=0.0, round_first=True), "x is float16"),
        (
            lambda k: k.rms_norm(random(2, 16), random(16), EPS, offset=0.0, round_first=True, residual=random(3, 16)),
            r"residual has the shape \[3, 16\]",
        ),
        (
            lambda k: k.rms_norm(random(2, 16), random(16), EPS, offset=0.0, round_first=True, residual=spaced(random(2, 16))),
            "residual must be contiguous",
        ),
        (lambda k: k.gate(random(2, 24), "silu"), "the last dimension of x is 24"),
        (lambda k: k.gate(random(2, 32), "relu"), "activation is 'relu'"),
        (lambda k: k.rotate(random(1, 2, 3, 48), random(1, 2, 3, 48), random(1, 3, 48), random(1, 3, 48)), "head_dim is 48"),
        (lambda k: k.rotate(random(1, 2, 3, 64), random(1, 2, 4, 64), random(1, 3, 64), random(1, 3, 64)), "key has the shape"),
        (lambda k: k.rotate(random(1, 2, 3, 64), random(1, 2, 3, 64), random(1, 3, 64), random(1, 2, 64)), "sin has the shape"),
    ],
)
def test_what_does_not_fit_is_named(plain: EmulatedDevice, call: Callable[[RowKernels], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(RowKernels(plain, BF16))


def test_nothing_gives_nothing(plain: EmulatedDevice) -> None:
    kernels = RowKernels(plain, BF16)
    assert kernels.rms_norm(random(0, 16), random(16), EPS, offset=0.0, round_first=True).shape == (0, 16)
    assert kernels.gate(random(0, 32), "silu").shape == (0, 16)
    assert kernels.rotate(random(1, 2, 0, 64), random(1, 2, 0, 64), random(1, 0, 64), random(1, 0, 64))[0].shape == (1, 2, 0, 64)
    with pytest.raises(ValueError, match="dtype is"):
        RowKernels(plain, torch.float32)

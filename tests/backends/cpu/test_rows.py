"""The small operations between attention and linear layers against float64, on every instruction set: as exact as torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamkv_backends.cpu.ops import CpuOps

WIDTHS = (16, 32, 48, 80, 512, 528, 1040)
EPS = 1e-6
ROWS = 200  # beyond what one thread does alone
NAN = float("nan")


@pytest.fixture
def ops(native: Any) -> CpuOps:
    return CpuOps(native)


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def as_exact_as_torch(ours: torch.Tensor, by_torch: torch.Tensor, exact: torch.Tensor) -> bool:
    """The largest error, measured in the largest number of its row, is at most twice torch's."""
    scale = exact.abs().amax(dim=-1, keepdim=True)
    error, allowed = (((one.double() - exact).abs() / scale).max() for one in (ours, by_torch))
    return bool(error <= 2 * allowed)


# -- norm -----------------------------------------------------------------------------------------------------------------


def llama(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


STYLES: dict[str, tuple[Callable[..., torch.Tensor], float, bool]] = {"Llama": (llama, 0.0, True), "Gemma": (gemma, 1.0, False)}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_is_as_exact_as_torch(ops: CpuOps, width: int, style: str) -> None:
    by_torch, offset, round_first = STYLES[style]
    weight = random(width, seed=1)
    # The last rows are so small that it matters on which side of the root eps stands, and that it is added at all.
    x = torch.cat([random(5, width), random(3, width, scale=300.0), random(3, width, scale=1e-3)])
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (weight.double() + offset)
    ours = ops.rms_norm(x, weight, EPS, offset=offset, round_first=round_first)
    assert as_exact_as_torch(ours, by_torch(x, weight), exact)


def test_a_norm_rounds_where_torch_does(ops: CpuOps) -> None:
    """Rounded once more or once less would be seen in the last bits of a third of all numbers."""
    x, weight = random(40, 512), random(512, seed=1)
    for by_torch, offset, round_first in STYLES.values():
        ours = ops.rms_norm(x, weight, EPS, offset=offset, round_first=round_first)
        other = ops.rms_norm(x, weight, EPS, offset=offset, round_first=not round_first)
        wanted = by_torch(x, weight)
        assert (ours != wanted).float().mean() < 0.02
        assert (other != wanted).float().mean() > 0.1


@pytest.mark.parametrize("part", [
    lambda x: x[:, :, :64], lambda x: x[:, 1:, 32:], lambda x: x.transpose(0, 1), lambda x: x[::2], lambda x: x[:0],
    lambda x: x[:1].expand(4, 6, 96), lambda x: x.flatten(0, 1)[5], lambda x: x[:, :, None, :32].expand(4, 6, 3, 32),
    lambda x: x.transpose(1, 2)[:, :32],
])  # fmt: skip
def test_a_norm_takes_any_strides(ops: CpuOps, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = part(random(4, 6, 96))
    if given.shape[-1] % 16:
        given = given.transpose(-1, -2)
    weight = random(given.shape[-1], seed=1)
    ours = ops.rms_norm(given, weight, EPS, offset=0.0, round_first=True)
    assert ours.is_contiguous()
    assert torch.equal(ours, ops.rms_norm(given.contiguous(), weight, EPS, offset=0.0, round_first=True))


# -- gate -----------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("scale", [1e-3, 2.0, 40.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_gate_is_as_exact_as_torch(ops: CpuOps, width: int, name: Any, scale: float) -> None:
    x = random(7, 2 * width, scale=scale)
    gate, up = x.split(width, dim=-1)
    act = ACTIVATIONS[name]
    assert as_exact_as_torch(ops.gate(x, name), act(gate) * up, act(gate.double()) * up.double())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_rounds_where_torch_does(ops: CpuOps, name: Any) -> None:
    """The activation is rounded before the product: left out, it would be seen in the last bits of a quarter of all numbers."""
    x = random(40, 2 * 512)
    gate, up = x.split(512, dim=-1)
    activation = ACTIVATIONS[name]
    assert (ops.gate(x, name) != activation(gate) * up).float().mean() < 0.02
    assert ((activation(gate.float()) * up.float()).bfloat16() != activation(gate) * up).float().mean() > 0.1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_keeps_the_digits_of_small_numbers(ops: CpuOps, name: Any) -> None:
    gate = torch.logspace(-30, 1, 64).bfloat16()
    gate = torch.cat([gate, -gate])
    ours = ops.gate(torch.cat([gate, torch.ones_like(gate)]), name).double()
    exact = ACTIVATIONS[name](gate.double())
    seen = exact.abs() > 1e-3 * gate.double().abs()  # far below 0 all digits are lost in torch too
    assert ((ours - exact).abs()[seen] <= 2**-8 * exact.abs()[seen]).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_has_the_limits_of_torch(ops: CpuOps, name: Any) -> None:
    extremes = torch.tensor([0.0, -0.0, 1e38, -1e38, 3e-39, float("inf"), NAN, -1e4] * 2).bfloat16()
    ours = ops.gate(torch.cat([extremes, torch.ones_like(extremes)]), name)
    wanted = ACTIVATIONS[name](extremes)
    near = torch.isclose(ours.float(), wanted.float(), rtol=2**-7, atol=1e-37, equal_nan=True)
    assert near.all(), (ours, wanted)


def test_a_gate_takes_any_strides(ops: CpuOps) -> None:
    x = random(4, 6, 192)
    for part in (x[:, :, :64], x.transpose(0, 1), x[::2, 3], x[:0], x[:, :, None].expand(4, 6, 2, 192)):
        assert torch.equal(ops.gate(part, "silu"), ops.gate(part.contiguous(), "silu"))


# -- rotate ---------------------------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def angles(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves that differ, as no rotary embedding has them: whoever reads the wrong half is seen."""
    return random(1, tokens, dim, seed=2, scale=1.0), random(1, tokens, dim, seed=3, scale=1.0)


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
def test_a_rotation_gives_torchs_bits(ops: CpuOps, dim: int, tokens: int) -> None:
    query, key, (cos, sin) = random(1, 6, tokens, dim), random(1, 2, tokens, dim, seed=1), angles(tokens, dim)
    queries, keys = ops.rotate(query, key, cos, sin)
    assert torch.equal(queries, rotate(query, cos, sin))
    assert torch.equal(keys, rotate(key, cos, sin))


def test_a_rotation_takes_any_strides(ops: CpuOps) -> None:
    packed, (cos, sin) = random(9, 10 * 64), angles(9, 128)
    heads = packed.view(1, 9, 10, 64).transpose(1, 2)  # as projections hand them over
    query, key = heads[:, :7], heads[:, 7:9]
    cos, sin = cos[..., ::2], sin[..., 64:]
    for q, k in ((query, key), (query[..., ::2], key[..., 1::2]), (query, key[:, :1].expand(1, 5, 9, 64))):
        c, s = cos[..., : q.shape[-1]], sin[..., : q.shape[-1]]
        queries, keys = ops.rotate(q, k, c, s)
        assert torch.equal(queries, rotate(q, c, s))
        assert torch.equal(keys, rotate(k, c, s))


# -- all ------------------------------------------------------------------------------------------------------------------


def operations(ops: CpuOps) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """[rows, 64] in, a row for each row out."""
    weight, up, (cos, sin) = random(64, seed=1), random(ROWS, 64, seed=4), angles(ROWS, 64)

    def both(x: torch.Tensor) -> torch.Tensor:
        queries, keys = ops.rotate(x[None, None], x[None, None], cos[:, : len(x)], sin[:, : len(x)])
        return torch.cat([queries[0, 0], keys[0, 0]], dim=-1)

    return {
        "norm": lambda x: ops.rms_norm(x, weight, EPS, offset=0.0, round_first=True),
        "gate": lambda x: ops.gate(torch.cat([x, up[: len(x)]], dim=-1), "silu"),
        "up": lambda x: ops.gate(torch.cat([up[: len(x)], x], dim=-1), "gelu_tanh"),
        "rotate": both,
    }


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["norm", "gate", "up", "rotate"])
def test_what_is_not_finite_stays_in_its_row(ops: CpuOps, name: str, value: float) -> None:
    operation, x = operations(ops)[name], random(ROWS, 64)
    clean = operation(x)
    x[17, 33] = value
    spoiled = operation(x)
    others = [row for row in range(ROWS) if row != 17]
    assert torch.equal(spoiled[others], clean[others])
    assert not spoiled[17].isfinite().all()


@pytest.mark.parametrize("name", ["norm", "gate", "up", "rotate"])
def test_threads_change_no_bit(ops: CpuOps, name: str) -> None:
    """Enough rows to be shared out, and each of them alone."""
    operation, x = operations(ops)[name], random(ROWS, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = operation(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, operation(x))
    assert torch.equal(together[:1], operation(x[:1]))

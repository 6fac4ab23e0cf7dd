"""What the rewriter may replace by the backend's operations, and what only looks like it. The families are in tests/runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamkv.runner.rewrite import _fits, _Norm, rewrite
from streamkv_backends.cpu.backend import CpuBackend

OPS = CpuBackend().ops
BF16 = torch.bfloat16


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> None:
        return None


def rewritten(inner: nn.Module) -> tuple[Any, dict[str, int]]:
    holder = Holder(inner).requires_grad_(False)
    return holder, dict(rewrite(holder, OPS, lambda linear: OPS.linear(linear, None)))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# -- merged products ----------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Hands each layer an input that fits it."""

    def __init__(self, value: nn.Linear | None) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(32, 16, bias=False, dtype=BF16) for _ in range(2))
        self.v_proj = self.k_proj if value is None else value
        self._inputs = [(layer.in_features, layer.weight.dtype) for layer in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # `x` itself where it fits: merged layers know each other by it.
        given = [x if known == (32, x.dtype) else x[..., : known[0]].to(known[1]) for known in self._inputs]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return torch.cat([layer(one).float() for layer, one in zip(layers, given, strict=True)], dim=-1)


VALUES: dict[str, tuple[Callable[[], nn.Linear | None], int]] = {
    "alike": (lambda: nn.Linear(32, 24, dtype=BF16), 1),
    "another dtype": (lambda: nn.Linear(32, 24), 0),
    "other inputs": (lambda: nn.Linear(16, 24, dtype=BF16), 0),
    "one layer twice": (lambda: None, 0),
}


@pytest.mark.parametrize("name", VALUES)
@torch.inference_mode()
def test_only_layers_that_are_alike_are_merged(name: str) -> None:
    value, merged = VALUES[name]
    plain, given = Projections(value()), random(1, 5, 32)
    wanted = plain(given)
    holder, done = rewritten(plain)
    assert done.get("merged", 0) == merged
    assert (holder.inner(given) - wanted).abs().max() <= 0.02 * wanted.abs().max()


# -- norms --------------------------------------------------------------------------------------------------------------


class Styled(nn.Module):
    def __init__(self, offset: float, round_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(64, seed=1) / 2 + 1)
        self.eps = 1e-6
        self._offset, self._round_first = offset, round_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (
            self.weight * normed.to(x.dtype) if self._round_first else (normed * (self.weight.float() + self._offset)).to(x.dtype)
        )


@pytest.mark.parametrize("style", [(0.0, True), (0.0, False), (1.0, False)], ids=["Llama", "OLMo", "Gemma"])
@torch.inference_mode()
def test_a_norms_style_is_found_by_its_numbers(style: tuple[float, bool]) -> None:
    plain, given = Styled(*style), random(40, 64)
    wanted = plain(given)
    holder, done = rewritten(plain)
    assert done["norm"] == 1
    assert isinstance(holder.inner, _Norm)
    assert (holder.inner(given) != wanted).float().mean() < 0.02, "another style differs in a third of the last bits"


# -- rotary embedding ---------------------------------------------------------------------------------------------------

ROPE = {"q": (1, 4, 3, 64), "k": (1, 2, 3, 64), "cos": (1, 3, 64), "sin": (1, 3, 64)}
MISFITS: dict[str, dict[str, tuple[int, ...]]] = {
    "part of a head": {"cos": (1, 3, 32), "sin": (1, 3, 32)},
    "a batch": {"q": (2, 4, 3, 64), "k": (2, 2, 3, 64)},
    "angles of another length": {"cos": (1, 4, 64), "sin": (1, 4, 64)},
    "angles for every head": {"cos": (1, 1, 3, 64), "sin": (1, 1, 3, 64)},
    "keys of another length": {"k": (1, 2, 4, 64)},
    "a width without whole vectors": {"q": (1, 4, 3, 48), "k": (1, 2, 3, 48), "cos": (1, 3, 48), "sin": (1, 3, 48)},
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_rotation_of_other_shapes_is_left_to_the_model(name: str) -> None:
    def fits(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = BF16) -> bool:
        q, k, cos, sin = (torch.zeros(shapes[part], dtype=dtype) for part in ("q", "k", "cos", "sin"))
        return _fits(q, k, cos, sin, OPS)

    assert fits(ROPE)
    assert not fits(ROPE, torch.float32)
    assert not fits(ROPE | MISFITS[name])

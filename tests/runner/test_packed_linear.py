"""Packed linear layers against the modules they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from streamkv.runner.loader import load_model
from streamkv.runner.packed_linear import PackedLinear, pack_linear
from streamkv.runner.rewrite import rewrite
from tests.runner.tiny import save_tiny


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 200])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_as_exact_as_torch(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    exact = nn.Linear(96, 176, bias=bias)
    plain = nn.Linear(96, 176, bias=bias, dtype=torch.bfloat16)
    plain.load_state_dict(exact.state_dict())
    exact.load_state_dict(plain.state_dict())  # the rounded weights, in float32
    given = torch.randn(1, rows, 96).bfloat16()
    wanted = exact(given.float())
    error = (PackedLinear(plain)(given).float() - wanted).abs().max()
    assert error <= 2 * (plain(given).float() - wanted).abs().max()


class Tied(nn.Module):
    """An embedding, something inside, and a head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16, dtype=torch.bfloat16)
        self.inner = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16))
        self.head = nn.Linear(16, 32, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@torch.inference_mode()
def test_only_bfloat16_is_packed_and_tied_weights_stay() -> None:
    assert pack_linear(nn.Linear(8, 8)) is None
    assert pack_linear(nn.Linear(8, 8, dtype=torch.float16)) is None
    model = Tied().requires_grad_(False)
    assert rewrite(model, None, pack_linear) == {"linear": 2}
    assert type(model.head) is PackedLinear
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"], "plain weights are freed, shared ones are not"


def test_a_model_loaded_in_bfloat16_is_packed_and_keeps_its_description(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    plain, packed = load_model(folder), load_model(folder, dtype="bfloat16")
    kinds = {type(module).__name__ for module in packed.module.modules()}
    assert "PackedLinear" in kinds
    assert "Linear" not in kinds
    assert not any(type(module) is PackedLinear for module in plain.module.modules())
    assert (packed.vocab_size, packed.layers) == (plain.vocab_size, plain.layers)

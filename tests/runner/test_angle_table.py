"""Rotary angles from a table against those that the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from streamkv.runner.angle_table import AngleTable, tabulate_angles
from streamkv.runner.arch_rope import pin_rope_tables
from tests.runner.families import FAMILIES

LENGTH = 100


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_config(FAMILIES[name].config()).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("Llama")])
@torch.inference_mode()
def test_every_position_has_the_angles_that_the_model_computes(name: str, dtype: torch.dtype) -> None:
    module = model(name)
    pin_rope_tables(module, LENGTH)
    rope = module.model.rotary_emb
    plain = rope.forward
    assert tabulate_angles(module, LENGTH, dtype) == 1
    table = rope.forward
    assert isinstance(table, AngleTable)
    x = torch.zeros((1, 3, 8), dtype=dtype)
    for first in range(LENGTH - 2):
        positions = torch.tensor([[first + 2, first, first + 1]])
        for given, wanted in zip(table(x, positions), plain(x, positions), strict=True):
            assert given.dtype is wanted.dtype is dtype
            # A cosine of many numbers at once may differ from that of a few in the last bit.
            assert torch.allclose(given.float(), wanted.float(), rtol=0, atol=torch.finfo(dtype).eps)
    other = torch.zeros((1, 3, 8), dtype=torch.float64)
    assert table(other, positions)[0].dtype is torch.float64


def test_a_table_that_would_be_large_and_what_is_no_such_module_stay() -> None:
    module = model("Llama")
    assert tabulate_angles(module, 2**22, torch.float32) == 0

    class WithLayers(nn.Module):
        rope_type = "default"

        def __init__(self) -> None:
            super().__init__()
            self.inv_freq = nn.Buffer(torch.ones(4))

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str) -> Any:
            raise AssertionError(layer_type)

    class Shapeless(WithLayers):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:  # type: ignore[override]  # another family's
            return torch.zeros(8), torch.zeros(8)

    holder = nn.ModuleList([WithLayers(), Shapeless()])
    assert tabulate_angles(holder, LENGTH, torch.float32) == 0
    assert not any("forward" in vars(one) for one in holder)

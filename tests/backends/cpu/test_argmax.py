"""The most probable token by the kernels: torch's, the first of equal ones, and a look for NaN and Inf on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamkv_backends.cpu.ops import CpuOps


@pytest.mark.parametrize("width", [1, 7, 16, 33, 3072, 32001])
def test_it_is_the_first_of_the_largest(native: Any, width: int) -> None:
    ops = CpuOps(native)
    # Few different values: most maxima are shared.
    logits = torch.randint(-5, 5, (9, width), generator=torch.Generator().manual_seed(width)).bfloat16()
    index, finite = ops.most_probable(logits)
    assert index.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert finite.all()
    assert ops.most_probable(logits[::2])[0].tolist() == index[::2].tolist()
    wide = torch.cat([logits, logits], dim=1)[:, :width]  # rows that are not side by side
    assert torch.equal(ops.most_probable(wide)[0], index)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 99, 100])
def test_a_row_that_is_not_finite_is_told_and_no_other(native: Any, value: float, place: int) -> None:
    logits = torch.randn((3, 101), generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = logits.argmax(dim=-1)
    logits[1, place] = value
    index, finite = CpuOps(native).most_probable(logits)
    assert finite.tolist() == [True, False, True]
    assert index[[0, 2]].tolist() == wanted[[0, 2]].tolist()
    assert 0 <= int(index[1]) < 101

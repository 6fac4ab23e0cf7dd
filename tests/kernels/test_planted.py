"""The machine that plants bugs in kernels tells those that are noticed from those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.rows import RowKernels
from tests.kernels.planted import Planted, plant, verdicts

FILE, LAUNCH = "activation.cu", "SKV_EXPORT(gate)"


def check(device: EmulatedDevice) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    expected = torch.nn.functional.silu(x[:, :32]) * x[:, 32:]
    assert torch.allclose(RowKernels(device, torch.float16).gate(x, "silu"), expected, rtol=1e-2, atol=1e-3), "other numbers"


BUGS = {
    Planted("nothing", FILE, LAUNCH, f"{LAUNCH} // as it was", "numbers"): "not noticed",
    Planted("nothing, looked at closely", FILE, LAUNCH, f"{LAUNCH} // as it was", "checked"): "not noticed",
    Planted("no source any more", FILE, LAUNCH, "}", "numbers"): "it does not compile",
    Planted("another function", FILE, "1.f + ex2(", "2.f + ex2(", "numbers"): None,
    Planted("another function, said to be found by the emulator", FILE, "1.f + ex2(", "2.f + ex2(", "runtime"): "numbers only",
    Planted("a barrier for some", FILE, "if (i >= width) return;", "if (i >= width) return; sync_block();", "runtime"): None,
    Planted("a barrier, said to be found by numbers", FILE, "return;\n", "return; else if (i) sync_block();\n", "numbers"):
        "noticed by the emulator",
}  # fmt: skip  # a line each


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_verdicts(bug: Planted, libraries: Path) -> None:
    ((_, verdict, _),) = verdicts([bug], check, libraries)
    assert (verdict is None) == (BUGS[bug] is None)
    assert BUGS[bug] is None or BUGS[bug] in verdict


def test_a_text_that_is_not_there_once_is_an_error_of_the_list(tmp_path: Path) -> None:
    for old in ("there is no such text", "x"):
        with pytest.raises(AssertionError, match=r"the text of 'stale' is \d+ times in activation\.cu"):
            plant(Planted("stale", FILE, old, "", "numbers"), tmp_path)

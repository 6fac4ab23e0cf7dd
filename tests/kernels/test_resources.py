"""The committed table of registers is of these kernels, and nothing spills."""

from __future__ import annotations

import pytest
import torch

from streamkv_kernels.compile import compiler_version
from streamkv_kernels.variants import Asked, asked
from tests.kernels.resources import COMPILED, key, read, row

VERSION, ROWS = read()
ALL = {key(kernel): kernel for kernel in asked()}
SOME = [kernel for kernel in asked((torch.bfloat16,), (64, 128)) if "KV=i8" not in key(kernel) and "GELU=1" not in key(kernel)]


def test_the_table_has_a_row_for_every_kernel_and_no_others() -> None:
    assert ROWS.keys() == ALL.keys(), "python -m tests.kernels.resources writes it again"


def test_little_spills_and_only_where_heads_are_wide() -> None:
    for begin, cells in ROWS.items():
        assert len(cells) == len(COMPILED)
        for architecture, cell in zip(COMPILED, cells, strict=True):
            registers, _, spilled = cell.partition(" + ")
            assert int(registers) <= 255
            if spilled:
                assert "HEAD_DIM=256" in begin or ("ROW_TILES=2" in begin and architecture in {"sm_100", "sm_120"}), begin
                assert int(spilled.removesuffix(" B")) <= 512, "and no static shared memory"


@pytest.mark.parametrize("kernel", SOME, ids=lambda kernel: f"{kernel.variant} {kernel.name}")
def test_it_is_what_the_compiler_says(kernel: Asked) -> None:
    (cell,) = row(kernel, ("sm_90",))
    assert "+" not in cell, "nothing spills"
    if compiler_version() == VERSION:
        written = int(ROWS[key(kernel)][COMPILED.index("sm_90")])
        assert abs(int(cell) - written) <= 8, "python -m tests.kernels.resources writes it again"

"""The committed table of registers is of these kernels, and nothing spills."""

from __future__ import annotations

import pytest

from streamkv_kernels.compile import compiler_version
from streamkv_kernels.variants import Asked, asked
from tests.kernels.resources import COMPILED, Table, code_of, key, row

TABLE = Table()
ALL = {key(kernel): kernel for kernel in asked()}
WRITE = "make kernels-resources writes the table"


def _tightest(column: int) -> Asked:
    return max(ALL.values(), key=lambda kernel: TABLE.rows.get(key(kernel), ("0",) * len(COMPILED))[column].zfill(3))


# Compiled again: attention of common models, a kernel of every source, and what is nearest to having no register left.
SOME = dict.fromkeys(
    [
        *((kernel, "sm_90") for begin, kernel in ALL.items() if begin[2].startswith("HEAD_DIM=128 IO=bf16 KV=bf16")),
        *((kernel, "sm_90") for kernel in {kernel.variant.source: kernel for kernel in ALL.values()}.values()),
        *((_tightest(number), COMPILED[number]) for number in (0, 5, 6)),
    ]
)


def test_the_table_has_a_row_for_every_kernel_and_no_others() -> None:
    assert TABLE.rows.keys() == ALL.keys(), WRITE


def test_the_table_is_of_this_code() -> None:
    """Whatever a change of the code does to registers, whoever makes it has compiled every variant."""
    assert TABLE.codes == {source: code_of(source) for source in {begin[0] for begin in ALL}}, WRITE


def test_nothing_spills() -> None:
    for begin, cells in TABLE.rows.items():
        assert len(cells) == len(COMPILED)
        for architecture, cell in zip(COMPILED, cells, strict=True):
            assert cell.isdigit(), f"{' '.join(begin)} for {architecture}: {cell}"
            assert int(cell) <= 255


@pytest.mark.parametrize(
    ("kernel", "architecture"), SOME, ids=lambda value: "-".join(key(value)[1:3]) if isinstance(value, Asked) else value
)
def test_it_is_what_the_compiler_says(kernel: Asked, architecture: str) -> None:
    (cell,) = row(kernel, (architecture,))
    assert cell.isdigit(), "nothing spills"
    if compiler_version() == TABLE.version:
        assert cell == TABLE.rows[key(kernel)][COMPILED.index(architecture)], WRITE

"""The committed table of registers is of these kernels, and nothing spills."""

from __future__ import annotations

import pytest

from streamkv_kernels.compile import compile_cubin, compiler_version
from streamkv_kernels.device import Variant
from streamkv_kernels.variants import Asked, asked
from tests.kernels.resources import COMPILED, Table, code_of, key, row

TABLE = Table()
ALL = {key(kernel): kernel for kernel in asked()}
WRITE = "make kernels-resources writes the table"
REGISTERS = 65536
"""Of a multiprocessor, and the most that one block may take."""
THREADS = {
    "attn_decode": 128,
    "attn_merge": 128,
    "attn_prefill": 128,
    "kv_write": 128,
    "rotate": 128,
    "logits": 1024,
    "sample": 1024,
}
"""Of the largest blocks that wrappers launch; 256 where nothing is said."""


def _tightest(column: int) -> Asked:
    return max(ALL.values(), key=lambda kernel: TABLE.rows.get(key(kernel), ("0",) * len(COMPILED))[column].zfill(3))


# Compiled again: what most models run, and what is nearest to having no register left.
SOME = [
    *(
        (kernel, "sm_90")
        for kernel in ALL.values()
        if str(kernel.variant).startswith("attn_decode -DHEAD_DIM=128 -DIO=bf16 -DKV=bf16")
    ),
    *((_tightest(number), COMPILED[number]) for number in (0, 5, 6)),
]


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
            assert int(cell) * THREADS.get(begin[0], 256) <= REGISTERS, "and blocks fit"


@pytest.mark.parametrize(
    ("kernel", "architecture"), SOME, ids=lambda value: "-".join(key(value)[1:3]) if isinstance(value, Asked) else value
)
def test_it_is_what_the_compiler_says(kernel: Asked, architecture: str) -> None:
    (cell,) = row(kernel, (architecture,))
    assert cell.isdigit(), "nothing spills"
    if compiler_version() == TABLE.version:
        assert cell == TABLE.rows[key(kernel)][COMPILED.index(architecture)], WRITE


def test_what_few_models_ask_of_kv_write_does_not_spill_either() -> None:
    defines = (("IO", "bf16"), ("KV", "e4m3"), ("HEAD_DIM", 256), ("ROT_DIM", 256), ("ROPE", 1), ("NORM", 1))
    (taken,) = compile_cubin(Variant("kv_write", defines), "sm_80")[1].values()
    assert taken.spilled == taken.stack == 0
    assert taken.registers * THREADS["kv_write"] <= REGISTERS

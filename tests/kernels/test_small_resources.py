"""What ptxas makes of the small kernels: nothing spills, and blocks are as large as the wrappers launch them."""

from __future__ import annotations

import pytest

from streamkv_kernels.compile import compile_cubin
from streamkv_kernels.device import Variant

REGISTERS = 65536
"""Of a multiprocessor, and the most that one block may take."""

VARIANTS = [
    (Variant("norm", (("IO", "bf16"), ("ROW_THREADS", 256))), 256),
    (Variant("activation", (("IO", "bf16"), ("GELU", 1))), 256),
    (Variant("rotate", (("IO", "bf16"), ("HEAD_DIM", 128))), 128),
    (Variant("blocks", (("CHUNK", 65536),)), 256),
    (
        Variant(
            "kv_write",
            (("IO", "bf16"), ("KV", "e4m3"), ("HEAD_DIM", 256), ("ROT_DIM", 256), ("ROPE", 1), ("NORM", 1)),
        ),
        128,
    ),
    (
        Variant(
            "kv_write",
            (("IO", "bf16"), ("KV", "bf16"), ("HEAD_DIM", 256), ("ROT_DIM", 256), ("ROPE", 3), ("NORM", 0)),
        ),
        128,
    ),
    (Variant("logits", (("LOGIT", "bf16"),)), 1024),
    (Variant("sample", (("LOGIT", "bf16"),)), 1024),
]


@pytest.mark.parametrize(("variant", "threads"), VARIANTS, ids=lambda value: getattr(value, "source", str(value)))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_nothing_spills_and_blocks_fit(variant: Variant, threads: int, architecture: str) -> None:
    _, resources = compile_cubin(variant, architecture)
    for name, taken in resources.items():
        assert taken.spilled == taken.stack == 0, name
        assert taken.registers * threads <= REGISTERS, name

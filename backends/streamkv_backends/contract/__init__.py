"""The contract that every attention backend passes within its `Limits`.

It needs no test framework:

    python -m streamkv_backends.contract package.module:Class        # or the name of an installed backend

    for case in cases(backend.limits):
        check(backend, case)                                         # AssertionError with one sentence

What is judged, and how:

    numbers     error <= 2 x the error of plain torch in the same dtype, both against float64, largest over a case, each head's
                output relative to its size. Nothing is tuned by hand: the bound comes from the same inputs (the acceptance rule
                of flash-attention's tests).
    reads       every slot that no sequence may read holds NaN, table entries past a sequence's end are absurd: a read of either
                shows in the output.
    writes      each step reads what earlier steps wrote, through shared, copied and moved blocks; blocks that a step does not
                address keep every byte.
    pool        copy, read, write, fill by themselves.
    refusals    what is outside the limits is refused in a sentence.

It imports the seam and torch, nothing else, so that it can stand beside any backend.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from streamkv.attention import AttentionBackend, KVPool, KVSpec, LayerSpec
from streamkv_backends.contract.cases import Case, Workload, cases
from streamkv_backends.contract.judge import require
from streamkv_backends.contract.pool import check_pool
from streamkv_backends.contract.trial import Trial

__all__ = ["Case", "Workload", "cases", "check", "check_refusals"]


def check(backend: AttentionBackend, case: Case) -> None:
    """Put a backend through one case, on pools of its own.

    Raises:
        AssertionError: what is wrong, and in which step, layer and sequence; or what the backend raised.
    """
    try:
        with torch.inference_mode():
            # The engine measures with a small pool first: the latest one is the one that counts.
            backend.allocate_kv(replace(case.spec, num_blocks=1))
            pool = backend.allocate_kv(case.spec)
            require(isinstance(pool, KVPool), "allocate_kv returned something that lacks a member of KVPool")
            require(pool.spec == case.spec, "pool.spec is not what was allocated")
            check_pool(pool)
            Trial(backend, pool, case).run()
    except AssertionError as error:
        raise AssertionError(f"{case.name}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{case.name}: it raised {error!r}") from error


def check_refusals(backend: AttentionBackend) -> None:
    """`allocate_kv` refuses what is outside the backend's limits, in a sentence.

    Raises:
        AssertionError: something outside the limits was accepted, or refused without a word.
    """
    require(isinstance(backend, AttentionBackend), "it lacks a member of streamkv.attention.AttentionBackend")
    for what, spec in _outside(backend).items():
        try:
            backend.allocate_kv(spec)
        except Exception as error:  # any class of error will do, as long as it says something
            require(len(str(error).split()) > 2, f"allocate_kv refuses {what} without a sentence: {error!r}")
        else:
            raise AssertionError(f"allocate_kv accepts {what}, which its limits exclude")


def _outside(backend: AttentionBackend) -> dict[str, KVSpec]:
    limits = backend.limits
    good = cases(limits)[0].spec
    layer = good.layers[0]

    def only(changed: LayerSpec) -> KVSpec:
        return replace(good, layers=(changed,))

    found = {"int8": replace(good, dtype=torch.int8), "3 heads on 2 KV heads": only(replace(layer, num_heads=3, num_kv_heads=2))}
    if limits.block_sizes is not None:
        found["a block size"] = replace(good, block_size=max(limits.block_sizes) + 1)
    if limits.head_dims is not None:
        found["a head_dim"] = only(replace(layer, head_dim=max(limits.head_dims) + 1))
    if not limits.windows:
        found["a sliding window"] = only(replace(layer, window=8))
    if not limits.soft_caps:
        found["a soft-cap"] = only(replace(layer, soft_cap=30.0))
    if not limits.sinks:
        found["sinks"] = only(replace(layer, has_sinks=True))
    return found

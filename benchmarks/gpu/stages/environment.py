"""What machine this is, and whether its kernels compile and load."""

from __future__ import annotations

import importlib
import inspect
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from time import perf_counter
from typing import Any, Final

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import Row
from streamkv_kernels.attention import AttentionSpec
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention
from streamkv_kernels.compile import compile_cubin
from streamkv_kernels.device import Variant

__all__ = ["compile_and_load", "environment"]

BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
_QUERIES: Final = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "mig.mode.current",
)


def environment(machine: Machine) -> Iterator[Row]:
    """Versions, clocks, and what torch offers to compare with."""
    yield {"fact": "kernels", "value": machine.kernels.name}
    yield {"fact": "multiprocessors", "value": machine.kernels.num_sms}
    yield {"fact": "torch's CUDA", "value": torch.version.cuda}
    if machine.timed:
        free, total = torch.cuda.mem_get_info()
        yield {"fact": "memory free / total, GiB", "value": f"{free / 2**30:.1f} / {total / 2**30:.1f}"}
        yield {"fact": "cache (L2), MiB", "value": torch.cuda.get_device_properties(machine.place).L2_cache_size // 2**20}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        for name, value in zip(_QUERIES, said.stdout.strip().split(", "), strict=False):
            yield {"fact": f"nvidia-smi {name}", "value": value}
    for module in ("triton", "flashinfer", "cuda.core", "cupy", "torch.nn.attention.flex_attention"):
        yield {"fact": f"import {module}", "value": _imports(module)}
    try:
        from torch.nn.attention.varlen import varlen_attn

        yield {"fact": "varlen_attn takes a block table", "value": "block_table" in inspect.signature(varlen_attn).parameters}
    except ImportError:
        yield {"fact": "varlen_attn", "value": "missing"}


def compile_and_load(machine: Machine) -> Iterator[Row]:
    """Make everything that has kernels: whether they compile, whether the driver takes them, and what they take of it."""
    recorder = _Recorder(machine)
    kinds = [(64, BF16)] if machine.tiny else list(product((64, 80, 96, 128, 256), (BF16, E4M3, INT8)))
    for head_dim, cache_dtype in kinds:
        spec = AttentionSpec(8, 2, head_dim, BF16, cache_dtype, head_dim**-0.5)
        DecodeAttention(recorder, spec, 1, machine.place)
        PrefillAttention(recorder, spec, place=machine.place)
        yield from recorder.taken()
    recorder.kernel(Variant("stream"), "read_pieces")
    yield from recorder.taken()


class _Recorder:
    """A device that writes down what is asked of it. Without a GPU kernels are compiled for one, and not loaded."""

    def __init__(self, machine: Machine) -> None:
        self.name, self.num_sms = machine.kernels.name, machine.kernels.num_sms
        self._machine = machine
        self._rows: list[Row] = []

    def kernel(self, variant: Variant, name: str, shared_bytes: int = 0) -> Any:
        begun = perf_counter()
        if self._machine.timed:
            found: Any = self._machine.kernels.kernel(variant, name, shared_bytes)
            attributes = dict(getattr(found.function, "attributes", {}))  # what the driver says
            registers, local = attributes.get("num_regs"), attributes.get("local_size_bytes")
            seconds = perf_counter() - begun
        else:
            resources = compile_cubin(variant, "sm_90")[1][name]
            found, registers, local, seconds = None, resources.registers, resources.stack, None
        facts = {"registers": registers, "bytes of stack": local, "KiB shared": shared_bytes / 1024, "seconds": seconds}
        self._rows.append({"kernel": str(variant), **facts, "loaded": self._machine.timed})
        return found

    def taken(self) -> list[Row]:
        """Rows since the last time."""
        rows, self._rows = self._rows, []
        return rows


def _imports(module: str) -> str:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a foreign package raises when it is imported
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return str(getattr(found, "__version__", "yes"))

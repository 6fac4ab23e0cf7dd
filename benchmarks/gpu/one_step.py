"""One small step of each attention kernel, for tools that look at a process from outside (sanitizers, ncu).

python -m benchmarks.gpu.one_step [--device emulated] [--large]
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.gpu.batch import make_batch
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stages.attention import decode_calls, prefill_calls, spec_of
from streamkv_kernels.rows import RowKernels

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Launch every kernel once.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.one_step", description="one step of each kernel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true", help="enough to fill a device: for ncu")
    options = parser.parse_args(arguments)
    machine = Machine.named(options.device, tiny=not options.large)
    with torch.inference_mode():
        decodes, chunks = ([(1, 4095)] * 64, [(4096, 0)]) if options.large else ([(1, 130), (1, 5), (3, 40)], [(40, 70), (1, 3)])
        for cache_dtype in (torch.bfloat16,) if options.large else (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            spec = spec_of(cache_dtype=cache_dtype) if options.large else spec_of((4, 2), 64, cache_dtype)
            for make, lengths in ((decode_calls, decodes), (prefill_calls, chunks)):
                make(machine, make_batch(machine, spec, lengths, 16, max_layers=1))[0]()
        x = torch.randn(64, 1024, device=machine.place).to(torch.bfloat16)
        RowKernels(machine.kernels, torch.bfloat16).rms_norm(x, x[0].clone(), 1e-6, offset=0.0, round_first=True)
        machine.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

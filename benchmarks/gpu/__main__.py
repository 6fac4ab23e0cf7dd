"""Everything that only a GPU can tell: right or wrong, how fast, and what share of the device that is.

python -m benchmarks.gpu [--out FOLDER] [--only STAGE ...] [--minutes 9]
python -m benchmarks.gpu --device emulated --tiny       # runs the same code where there is no GPU; times are left out

Results are written as they are found: results.json and results.md in the folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import LostDeviceError, Results, run_stages
from benchmarks.gpu.stages import STAGES
from benchmarks.report import setting

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run the stages.

    Returns:
        0, or 1 if a stage failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="what only a GPU can tell")
    parser.add_argument("--device", default="cuda", help="cuda (default) or emulated")
    parser.add_argument("--tiny", action="store_true", help="shapes that the emulator can run")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results.json and results.md")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="some stages only")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has, and go on")
    options = parser.parse_args(arguments)
    results = Results.resumed(options.out) if options.resume else Results(options.out)
    machine = Machine.named(options.device, tiny=options.tiny)
    results.setting = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "device": machine.kernels.name}
    results.setting |= setting("torch", "cupy-cuda13x", "cuda-core", "nvidia-cuda-nvrtc", "triton", "flashinfer-python")
    # A kernel that never ends must not take the machine's time; the results are written by then.
    faulthandler.dump_traceback_later(60 * options.minutes + 30, exit=True, file=sys.__stderr__ or sys.stderr)
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    try:
        with torch.inference_mode():
            run_stages(stages, machine, results, options.minutes)
    except LostDeviceError as error:
        print(f"the GPU is lost to this process ({error}); going on in another", flush=True)
        again = [argument for argument in arguments if argument != "--resume"] + ["--resume"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *again])  # noqa: S606  # itself
    faulthandler.cancel_dump_traceback_later()
    print(results.tables())
    failed = [name for name, stage in results.stages.items() if stage["error"]]
    if failed:
        print(f"not complete: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

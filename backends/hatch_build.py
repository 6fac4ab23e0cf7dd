"""With STREAMKV_PREBUILD=1 the wheel carries the kernels for processors, compiled for every instruction set.

And those for GPUs that `python -m streamkv_kernels.variants` has compiled before: that takes NVRTC and torch, which are not here
where a wheel is put together. It is then a wheel for this platform; without, it is for any, and kernels are compiled when they
are first used.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuildHook(BuildHookInterface):  # type: ignore[type-arg]  # its configuration is not used
    """See the module's docstring."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the wheel is put together."""
        if os.environ.get("STREAMKV_PREBUILD") != "1":
            return
        root = Path(self.root)
        sys.path[:0] = [str(root), str(root / "backends")]
        from streamkv_backends.cpu.build import prebuild

        cubins = (root / "kernels_cuda/streamkv_kernels/prebuilt").glob("*.cubin")
        build_data["artifacts"] += [str(path.relative_to(root)) for path in (*prebuild(), *cubins)]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

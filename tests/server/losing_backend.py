"""The reference backend, until a file says that its device is lost: then every call fails. For `streamkv serve --backend`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from streamkv_backends.torch_backend import TorchBackend

VARIABLE = "STREAMKV_TEST_LOST"


class LosingBackend(TorchBackend):
    """Its errors are those of a CUDA context after a kernel has read where it must not."""

    def prepare(self, tensors: Any) -> Any:
        self.synchronize()
        return super().prepare(tensors)

    def synchronize(self) -> None:
        if Path(os.environ[VARIABLE]).exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

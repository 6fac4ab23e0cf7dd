"""The reference backend, until a file says that it is time to hang. For `streamkv serve --backend`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from streamkv_backends.torch_backend import TorchBackend

VARIABLE = "STREAMKV_TEST_HANG"


class HangingBackend(TorchBackend):
    """Hangs at the beginning of a step."""

    def prepare(self, tensors: Any) -> Any:
        if Path(os.environ[VARIABLE]).exists():
            time.sleep(3600)
        return super().prepare(tensors)

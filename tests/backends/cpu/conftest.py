"""The kernels, compiled for every instruction set that this processor has."""

from __future__ import annotations

from typing import Any

import pytest

from streamkv_backends.cpu.build import ISAS, cpu_flags, find_or_build
from streamkv_backends.cpu.native import load

HERE = [isa for isa in ISAS if isa.needs <= cpu_flags()]


@pytest.fixture(params=HERE, ids=lambda isa: isa.name, scope="session")
def native(request: pytest.FixtureRequest) -> Any:
    library = load(find_or_build(request.param))
    library.isa = request.param.name
    return library

"""The kernels, compiled for every instruction set that this processor has; for one of them if STREAMKV_CPU_ISA names it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from streamkv_backends.cpu.build import ISAS, cpu_flags, find_or_build
from streamkv_backends.cpu.native import load

ASKED = os.environ.get("STREAMKV_CPU_ISA")
HERE = [isa for isa in ISAS if isa.needs <= cpu_flags() and ASKED in {None, isa.name}]


@pytest.fixture(params=HERE, ids=lambda isa: isa.name, scope="session")
def native(request: pytest.FixtureRequest) -> Any:
    library = load(find_or_build(request.param))
    library.isa = request.param.name
    return library

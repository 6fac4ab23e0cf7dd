"""Emulated devices that share one folder of compiled libraries, so that no variant is compiled twice in a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamkv_kernels.emulated import EmulatedDevice


@pytest.fixture(scope="session")
def plain(libraries: Path) -> EmulatedDevice:
    """Fast, for wide tables of numbers."""
    return EmulatedDevice(cache=libraries, optimize=1)


@pytest.fixture(scope="session")
def checked(libraries: Path) -> EmulatedDevice:
    """Looks at every load and store."""
    return EmulatedDevice(cache=libraries, checked=True, optimize=1)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """References here are tiny: a team of threads costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

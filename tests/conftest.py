"""Settings of all tests: Hypothesis draws the same examples every time; `HYPOTHESIS_PROFILE=explore` draws new ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

# Before torch is imported, also in processes that tests start: the models are tiny, and spinning threads fight over cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
# Planted bugs need a verdict, not the smallest example.
settings.register_profile("verdict", settings.get_profile("same"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emulated CUDA kernels, compiled once a session, for tests of the kernels and of what uses them."""
    return tmp_path_factory.mktemp("kernels")

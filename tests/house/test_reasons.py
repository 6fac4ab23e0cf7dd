"""Every exception from a rule of the linters carries its reason in the same line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("streamkv", "backends", "kernels_cuda", "tests", "benchmarks")
EXCEPTION = re.compile(r"#\s*(noqa|type:\s*ignore|ruff:\s*noqa)")
WITH_REASON = re.compile(r"#\s*(?:ruff:\s*)?(?:noqa: [A-Z0-9, ]+|type: ignore\[[a-z-]+(?:, ?[a-z-]+)*\])\s*(?:#| - )\s*\w.{5,}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_exceptions_have_reasons(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path == Path(__file__) or not EXCEPTION.search(line):
                continue
            assert WITH_REASON.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"

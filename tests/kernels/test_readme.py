"""What kernels_cuda/README.md shows does run, and the files that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamkv_kernels.device import SOURCES

README = (Path(__file__).parents[2] / "kernels_cuda" / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
def test_its_programs_run(
    code: str, libraries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMKV_CACHE", str(libraries))
    exec(compile(code, "README.md", "exec"), {})
    assert "print" not in code or "'global_sectors': 6" in capsys.readouterr().out


def test_it_names_every_source_and_no_other_file() -> None:
    named = set(re.findall(r"`(\w+\.(?:cu|cuh|h|cpp|py))`", README))
    sources = {path.name for suffix in ("cu", "cuh", "h", "cpp") for path in SOURCES.glob(f"*.{suffix}")}
    assert sources <= named
    assert {name for name in named if not (SOURCES / name).is_file()} == {"name.cu"}

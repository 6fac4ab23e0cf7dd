"""Programs in docs/embeddings.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embeddings.md"


def test_the_program_on_the_page_runs() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    similarity, first, second, echoed = done.stdout.strip().splitlines()[-4:]
    assert -1.0 <= float(similarity) <= 1.0
    assert {first.split()[0], second.split()[0]} == {"1", "2"}
    assert echoed.startswith("The fox said")

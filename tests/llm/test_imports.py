"""What an import costs: `streamkv` alone brings no torch, `LLM` neither the server's libraries; each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llm.conftest import SETTINGS

LIMIT_S = 120

GENERATE = """
from streamkv import LLM, SamplingParams
llm = LLM({folder!r}, **{settings!r})
(output,) = llm.generate([[10, 20, 30]], SamplingParams(max_tokens=4), use_tqdm=False)
assert len(output.outputs[0].token_ids) == 4
"""


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """Top-level names of what a fresh interpreter has imported after this code; it must also end by itself, silently."""
    listing = tmp_path / "modules.json"
    code += f"\nimport json, pathlib, sys; pathlib.Path({str(listing)!r}).write_text(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code], check=False, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return set(json.loads(listing.read_text()))


@pytest.mark.parametrize("code", ["import streamkv", "from streamkv import SamplingParams; SamplingParams(n=2)"])
def test_the_package_alone_is_cheap(code: str, tmp_path: Path) -> None:
    modules = modules_after(code, tmp_path)
    assert not modules & {"torch", "transformers", "aiohttp", "uvloop", "tokenizers", "numpy"}


def test_llm_needs_no_server_and_a_program_that_forgets_to_close_it_still_ends(folder: Path, tmp_path: Path) -> None:
    modules = modules_after(GENERATE.format(folder=str(folder), settings=SETTINGS), tmp_path)
    assert "torch" in modules
    assert not modules & {"aiohttp", "uvloop"}
    assert not {name for name in modules if name.startswith(("streamkv.server", "streamkv.protocol", "streamkv.cli"))}

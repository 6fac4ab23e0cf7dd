"""Plant bugs one by one; every one must turn a test red: ``python tests/mutants/run.py [FOLDER or NAME ...]``.

Each patch in the folders here is applied to a copy of the sources, and the tests that it names above its first line ("Test:
NODE-ID") are run. It counts as noticed only if tests ran and one of them failed: a patch that names none, that does not apply,
that merely breaks an import, or with which the tests never end, is an error of the patch and fails this run. A hang says
nothing: a busy machine looks the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PATCHES: Final = sorted(Path(__file__).parent.glob("*/*.patch"))
LIMIT_S: Final = 300
"""Only a hang takes so long, on a busy machine too."""
SETTINGS: Final = {"cpu": {"CXX": str(Path(__file__).parent / "cpu" / "cxx"), "STREAMKV_CPU_ISA": "portable"}}
"""Environment of a part's tests: kernels compiled anew, but for one instruction set and without optimisation."""
COPIED: Final = ("streamkv", "backends", "tests", "pyproject.toml")


def main() -> int:
    """Print one line per planted bug and the sum; 0 if all were noticed."""
    words = sys.argv[1:]
    chosen = [patch for patch in PATCHES if not words or any(word in f"{patch.parent.name}/{patch.name}" for word in words)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as cache, ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in sorted({patch.parent.name for patch in chosen}):
            problem = run_tests(part, None, cache)
            if problem != "green":
                print(f"the tests of {part} must be green before bugs are planted: {problem}")
                return 1
        verdicts = pool.map(lambda patch: run_tests(patch.parent.name, patch, cache), chosen)
        passed = 0
        for number, (patch, verdict) in enumerate(zip(chosen, verdicts, strict=True), 1):
            noticed = verdict.startswith("red")
            passed += noticed
            print(f"[{number}/{len(chosen)}] {'noticed' if noticed else 'NOT NOTICED'}: {patch.stem}: {verdict}", flush=True)
    print(f"{passed} passed, {len(chosen) - passed} failed")
    return 0 if passed == len(chosen) and chosen else 1


def named(patch: Path) -> list[str]:
    """The tests that a patch names."""
    return [line.removeprefix("Test: ") for line in patch.read_text().splitlines() if line.startswith("Test: ")]


def run_tests(part: str, patch: Path | None, cache: str) -> str:
    """Run a part's tests on a patched copy; "red: first failing test", "green", or what is wrong with the patch."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        work = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
            else:
                shutil.copy(source, work / name)
        if patch is not None:
            applied = subprocess.run(
                ["git", "apply", "--unidiff-zero", str(patch)], cwd=work, check=False, capture_output=True, text=True
            )
            if applied.returncode:
                return f"the patch does not apply: {applied.stderr.strip()}"
        patches = [one for one in PATCHES if one.parent.name == part] if patch is None else [patch]
        tests = list(dict.fromkeys(test for one in patches for test in named(one)))
        if not tests:
            return 'the patch names no test ("Test: NODE-ID" above its first line)'
        return judge(work, tests, SETTINGS[part] | {"STREAMKV_CACHE": cache, "OBJECTS": cache} if part in SETTINGS else {})


def judge(work: Path, tests: list[str], settings: dict[str, str]) -> str:
    """What the tests say of the sources in ``work``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    python = {"PYTHONPATH": f"{work}:{work / 'backends'}", "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "verdict"}
    environment = os.environ | python | settings
    try:
        done = subprocess.run(command, cwd=work, env=environment, check=False, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"a hang: the tests did not end within {LIMIT_S} s; have one fail instead, or give it a time limit of its own"
    if done.returncode == 0:
        return "green"
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None or "error during collection" in done.stdout:
        return "the tests could not run: " + " ".join(done.stdout.split()[-30:])
    return f"red: {failed[1]}"


if __name__ == "__main__":
    sys.exit(main())

"""Build the wheel, install it alone into a new environment, and run the smoke tests on it away from the sources.

The editable install exposes the repository's root, so that a file missing from the wheel would never be noticed there. The new
environment borrows only the dependencies of the one that runs this script.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> None:
    """Run and stop at the first failure."""
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def borrowed(site: Path, target: Path) -> None:
    """Link every installed package but ours into `target`."""
    for entry in site.iterdir():
        if "streamkv" not in entry.name.lower() and entry.suffix != ".pth":
            (target / entry.name).symlink_to(entry)


def main() -> int:
    """Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="wheel-smoke-") as folder:
        work = Path(folder)
        print("building the wheel ...", flush=True)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", work, ROOT, cwd=work)
        (wheel,) = work.glob("*.whl")
        venv.create(work / "env", with_pip=False, symlinks=True)
        python = work / "env" / "bin" / "python"
        site = Path(sysconfig.get_paths(vars={"base": str(work / "env"), "platbase": str(work / "env")})["purelib"])
        borrowed(Path(sysconfig.get_paths()["purelib"]), site)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=work)
        away = work / "away"
        shutil.copytree(ROOT / "tests", away / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "compose.yaml"):  # tests read them when they are collected
            shutil.copy(ROOT / name, away)
        shutil.copytree(ROOT / "docs", away / "docs")
        (away / "kernels_cuda").mkdir()
        for name in ("README.md", "resources.md"):
            shutil.copy(ROOT / "kernels_cuda" / name, away / "kernels_cuda")
        (away / "pytest.ini").write_text(
            "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
            "markers =\n    smoke: works on the wheel\n    gpu: needs a GPU\n"
        )
        check = (
            "import streamkv, sys; assert sys.prefix in streamkv.__file__, streamkv.__file__; print('testing', streamkv.__file__)"
        )
        run(python, "-c", check, cwd=away)
        run(python, "-m", "pytest", "-q", "-m", "smoke", cwd=away)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

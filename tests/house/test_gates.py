"""What the sources must never contain: deserialisers that run code, evaluation, open doors by default."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path for folder in ("streamkv", "backends", "kernels_cuda", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "recv_pyobj", "send_pyobj", "os.system", "os.popen", "tempfile.mktemp"}


def problems(source: str) -> list[str]:
    """What is wrong with a module, as words."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                found.append(module)
            case ast.Call():
                found += _of_call(node)
            case ast.Constant(value="0.0.0.0" | "::"):  # what is looked for
                found.append("an address of every interface")
    return found


def _of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    found = [name] if name in CALLS or name.split(".")[-1] in {"recv_pyobj", "send_pyobj"} else []
    if name.split(".")[-1] == "load" and name.split(".")[0] in {"torch", "yaml", "np", "numpy"}:
        safe = {
            "torch": given.get("weights_only") == "True",
            "yaml": "Safe" in given.get("Loader", ""),
            "np": given.get("allow_pickle", "False") == "False",
            "numpy": given.get("allow_pickle", "False") == "False",
        }
        found += [] if safe[name.split(".")[0]] else [name]
    if name in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}:
        found.append(name)
    if given.get("allow_pickle") == "True":
        found.append("allow_pickle")
    if given.get("trust_remote_code", "False") != "False":
        found.append("trust_remote_code")
    if given.get("shell") == "True":
        found.append("shell=True")
    if given.get("verify") == "False" or given.get("ssl") == "False":
        found.append("certificates are not checked")
    return found


# One line each that the gate must not let through: a gate that finds nothing proves nothing.
PLANTED = [
    "import pickle",
    "import os, marshal",
    "from cloudpickle import loads",
    "import torch.utils\nimport dill.source",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'exec')",
    "__import__('os')",
    "socket.recv_pyobj()",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
    "np.load(path, allow_pickle=True)",
    "f(allow_pickle=True)",
    "from_pretrained(x, trust_remote_code=True)",
    "from_pretrained(x, trust_remote_code=flag)",
    "subprocess.run(x, shell=True)",
    "get(url, verify=False)",
    "host = '0.0.0.0'",
    "def f(host='::'): ...",
]
FINE = [
    "torch.load(path, weights_only=True)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "np.load(path)",
    "re.compile('x')",
    "model.eval()",
    "from_pretrained(x, trust_remote_code=False)",
    "from_bytes = 'pickle'",
]
# (file, what): why it is right there
ALLOWED = {
    ("streamkv/cli/serve.py", "an address of every interface"): "compared with, to print an address that can be connected to",
}


@pytest.mark.parametrize("line", PLANTED)
def test_r_pickle_the_gate_sees_what_is_planted(line: str) -> None:
    assert problems(line)


@pytest.mark.parametrize("line", FINE)
def test_r_pickle_the_gate_lets_through_what_is_safe(line: str) -> None:
    assert not problems(line)


def test_r_pickle_nothing_shipped_can_run_what_it_reads() -> None:
    """R-PICKLE: on all sources, dead or alive."""
    assert len(SHIPPED) > 50
    for path in SHIPPED:
        name = str(path.relative_to(ROOT))
        wrong = [found for found in problems(path.read_text()) if (name, found) not in ALLOWED]
        assert not wrong, f"{name}: {wrong}"


def test_r_pickle_every_exception_is_still_needed() -> None:
    for name, found in ALLOWED:
        assert found in problems((ROOT / name).read_text()), name


def test_no_literal_switches_certificates_or_remote_code_off_in_texts() -> None:
    for name in ("Dockerfile", "compose.yaml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"trust[-_]remote[-_]code|--insecure-no-auth|--no-verify", text), name


def _tool(name: str) -> list[str]:
    """How to run it, or a loud skip."""
    if shutil.which(name, path=str(Path(sys.executable).parent)) or importlib.util.find_spec(name.replace("-", "_")):
        return [sys.executable, "-m", name.replace("-", "_")]
    warnings.warn(f"{name} IS NOT INSTALLED: its checks have not been made", stacklevel=2)
    pytest.skip(f"{name} IS NOT INSTALLED: its checks have not been made")


def test_bandit_finds_nothing() -> None:
    command = [*_tool("bandit"), "-q", "-r", "streamkv", "backends", "-lll"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_pip_audit_finds_nothing() -> None:
    command = [*_tool("pip-audit"), "--progress-spinner", "off", "--timeout", "5", "-r", "constraints.txt", "--no-deps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "vulnerabilit" not in done.stdout + done.stderr:
        warnings.warn("VULNERABILITY DATA CANNOT BE REACHED: dependencies have not been audited", stacklevel=1)
        pytest.skip("VULNERABILITY DATA CANNOT BE REACHED: dependencies have not been audited")
    assert done.returncode == 0, done.stdout

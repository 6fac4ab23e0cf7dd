"""Backends are chosen by name, imported late, and every failure says in one sentence which of the possible ones it is."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from streamkv.attention import KVSpec, LayerSpec, Limits
from streamkv.backend_registry import backend_for, load_backend
from streamkv.errors import BackendError
from streamkv_backends.cpu import build, native
from streamkv_backends.torch_backend import TorchBackend

PEBBLE = "tests.backends.third_party.streamkv_pebble"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, where tests put modules and the metadata of packages."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def declare(site: Path, package: str, **backends: str) -> None:
    """What pip leaves of a package that declares backends."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in backends.items()]
    (info / "entry_points.txt").write_text("\n".join(["[streamkv.backends]", *lines]))


def installed(monkeypatch: pytest.MonkeyPatch, **backends: str) -> None:
    """As if packages declared these and no others."""
    entries = [EntryPoint(name, value, "streamkv.backends") for name, value in backends.items()]
    monkeypatch.setattr("streamkv.entry_points.entry_points", lambda group: entries)


OURS = {"cpu": "streamkv_backends.cpu.backend:CpuBackend", "torch": "streamkv_backends.torch_backend:TorchBackend"}


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# ---------------------------------------------------------------- choosing


@pytest.mark.smoke
def test_torch_by_name() -> None:
    backend, reason = load_backend("torch")
    assert isinstance(backend, TorchBackend)
    assert reason == "asked for by name 'torch'"


def test_import_string_needs_no_metadata() -> None:
    backend, reason = load_backend(f"{PEBBLE}:PebbleBackend")
    assert backend.name == "pebble"
    assert reason == f"asked for by import string {PEBBLE}:PebbleBackend"


def test_auto_without_a_gpu_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    backend, reason = load_backend("auto")
    assert (backend.name, reason) == ("cpu", "auto: torch sees no CUDA device")


def test_auto_without_a_gpu_and_without_a_compiler_is_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch)
    native.library.cache_clear()
    monkeypatch.setattr(build, "_PREBUILT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    backend, reason = load_backend("auto")
    assert backend.name == "torch"
    assert reason == (
        "auto: torch sees no CUDA device; the cpu backend cannot be used (the cpu backend needs a C++ compiler the first time; "
        "install g++ or clang++, or use --backend torch)"
    )


GPU_BACKENDS = {
    "works": ("class Backend(PebbleBackend): ...", "auto", "pebble", "auto: torch sees a CUDA device"),
    "cannot work here": (
        "def Backend(device): raise BackendError('the driver is too old')",
        "auto",
        "cpu",
        "auto: the cuda backend cannot be used (the driver is too old)",
    ),
    "CPU is asked for": ("class Backend(PebbleBackend): ...", "cpu", "cpu", "auto: device cpu is asked for"),
}


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_auto_with_a_gpu(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, device, chosen, reason = GPU_BACKENDS[name]
    module = f"gpu_{name.replace(' ', '_')}"
    (site / f"{module}.py").write_text(f"from streamkv.errors import BackendError\nfrom {PEBBLE} import PebbleBackend\n{code}\n")
    installed(monkeypatch, **OURS, cuda=f"{module}:Backend")
    with_gpu(monkeypatch)
    backend, said = load_backend("auto", device)
    assert (backend.name, said) == (chosen, reason)


def test_auto_with_a_gpu_and_no_backend_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    installed(monkeypatch, **OURS)
    backend, reason = load_backend("auto")
    assert (backend.name, reason) == ("cpu", "auto: no cuda backend is installed")


def test_backends_are_imported_late() -> None:
    code = (
        "import sys, streamkv.backend_registry as registry; registry.available(); "
        "sys.exit('streamkv_backends.torch_backend' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# ---------------------------------------------------------------- failing

MODULES = {
    "needs_missing": "import there_is_no_such_thing\n",
    "needs_missing_name": "from os import there_is_no_such_thing\n",
    "broken": "1 / 0\n",
    "no_syntax": "class\n",
    "odd": (
        "import pathlib\n"
        "number = 7\n"
        "def raises(device): raise RuntimeError('no licence')\n"
        "def takes_nothing(): ...\n"
        "class Half:\n"
        "    name = 'half'\n"
        "    def __init__(self, device): ...\n"
        "    def prepare(self, tensors): ...\n"
        f"from {PEBBLE} import PebbleBackend\n"
        "class Outer:\n"
        "    class Inner(PebbleBackend): ...\n"
        "class NoLimits(PebbleBackend):\n"
        "    limits = None\n"
    ),
}

FAILURES = {
    "torhc": "backend 'torhc' is unknown; use one of auto, .*torch.*, or package.module:Class",
    "": "backend '' is unknown",
    "no_such_package:Class": "'no_such_package:Class': there is no module no_such_package; install the package that has it",
    "no_such_package.sub:Class": "there is no module no_such_package; install",
    "streamkv.no_such_module:Class": "there is no module streamkv.no_such_module; install",
    "needs_missing:Class": "needs_missing needs the module there_is_no_such_thing, which is not installed",
    "needs_missing_name:Class": "an import inside needs_missing_name failed: cannot import name 'there_is_no_such_thing'",
    "broken:Class": r"broken cannot be imported: ZeroDivisionError\('division by zero'\)",
    "no_syntax:Class": "no_syntax cannot be imported: SyntaxError",
    "odd:Class": "odd has no Class",
    "odd:Outer.Missing": "odd has no Outer.Missing",
    "odd:number": "'odd:number' is no class but an object of type int",
    "odd:raises": r"cannot be made for device 'auto': RuntimeError\('no licence'\)",
    "odd:takes_nothing": "cannot be made for device 'auto': TypeError",
    "odd:Half": "is no streamkv.attention.AttentionBackend: it lacks limits, ops, allocate_kv, attend",
    "odd:pathlib.PurePath": "it lacks limits, ops, allocate_kv, prepare, attend",
    "odd:NoLimits": "its limits are no streamkv.attention.Limits",
    ":Class": "':Class' names no class; the form is package.module:Class",
    "odd:": "'odd:' names no class",
    ".odd:Class": "'.odd:Class' names no class",
    "odd:Class:Class": "'odd:Class:Class' names no class",
    "../odd.py:Class": "names no class",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_told(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, code in MODULES.items():
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(code)
    with pytest.raises(BackendError) as caught:
        load_backend(name)
    assert re.search(FAILURES[name], caught.value.message), caught.value.message
    assert "\n" not in caught.value.message


def test_a_nested_class_can_be_named(site: Path) -> None:
    (site / "nested.py").write_text(MODULES["odd"])
    assert load_backend("nested:Outer.Inner")[0].name == "pebble"


def test_the_cause_is_kept_for_the_log(site: Path) -> None:
    (site / "cause.py").write_text("import there_is_no_such_thing\n")
    with pytest.raises(BackendError) as caught:
        load_backend("cause:Class")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_device_that_only_one_backend_knows_is_no_torch_device() -> None:
    for name in ("auto", "torch", "cpu"):
        with pytest.raises(BackendError, match="emulated"):
            load_backend(name, "emulated")


def test_two_packages_may_not_share_a_name(site: Path) -> None:
    declare(site, "one", pebble="one:Backend")
    declare(site, "two", pebble="two:Backend")
    with pytest.raises(
        BackendError, match=r"'pebble' is declared twice, as (one|two):Backend and as (one|two):Backend; uninstall"
    ):
        load_backend("torch")


def test_an_entry_point_without_a_class_is_told(site: Path) -> None:
    declare(site, "bare", bare="os.path")
    with pytest.raises(BackendError, match="backend 'bare' names no class"):
        load_backend("bare")


@pytest.mark.parametrize("device", ["cuda:99", "no_such_device", ""])
def test_a_device_that_torch_lacks(device: str) -> None:
    with pytest.raises(BackendError, match=f"device {device!r} is asked for and torch sees (no|[0-9]+) CUDA device"):
        load_backend("torch", device)


# ---------------------------------------------------------------- limits

LAYER = LayerSpec(num_heads=8, num_kv_heads=2, head_dim=128, scale=0.1)
SPEC = KVSpec(num_blocks=1, block_size=16, dtype=torch.bfloat16, layers=(LAYER, LAYER))
NARROW = Limits(
    "cpu",
    frozenset({torch.bfloat16, torch.float16}),
    frozenset({64, 128}),
    frozenset({16, 32}),
    windows=False,
    soft_caps=False,
    sinks=False,
)


def second(**changes: object) -> KVSpec:
    return replace(SPEC, layers=(LAYER, replace(LAYER, **changes)))


REFUSALS = {
    "dtype float32 is not supported; use one of bfloat16, float16": replace(SPEC, dtype=torch.float32),
    "block size 8 is not supported; use one of [16, 32]": replace(SPEC, block_size=8),
    "head_dim 80 is not supported; supported are [64, 128]": second(head_dim=80),
    "layer 1: 9 heads is no multiple of 2 KV heads": second(num_heads=9),
    "layer 1 has a sliding window, which this backend lacks": second(window=4096),
    "layer 1 soft-caps its scores, which this backend lacks": second(soft_cap=50.0),
    "layer 1 has attention sinks, which this backend lacks": second(has_sinks=True),
}


class Narrow(TorchBackend):
    name = "narrow"

    @property
    def limits(self) -> Limits:
        return NARROW


@pytest.mark.parametrize("sentence", REFUSALS)
def test_a_model_outside_the_limits_is_refused(sentence: str) -> None:
    with pytest.raises(BackendError) as caught:
        backend_for("narrow", Narrow(), REFUSALS[sentence])
    assert caught.value.message == f"backend 'narrow' cannot serve this model: {sentence}"
    with pytest.raises(BackendError, match=re.escape(sentence)):
        Narrow().allocate_kv(REFUSALS[sentence])


def test_a_model_within_the_limits_is_served() -> None:
    backend = Narrow()
    assert backend_for("narrow", backend, SPEC) == (backend, None)
    assert backend.allocate_kv(SPEC).spec == SPEC


@pytest.mark.parametrize("sentence", REFUSALS)
def test_where_the_choice_is_ours_torch_serves_what_the_first_one_cannot(sentence: str) -> None:
    backend, reason = backend_for("auto", Narrow(), REFUSALS[sentence])
    assert backend.name == "torch"
    assert reason == f"backend 'narrow' cannot serve this model: {sentence}"


def test_a_pool_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(BackendError, match=r"16777216\.0 GiB for 1099511627776 KV blocks cannot be allocated; ask for less"):
        TorchBackend().allocate_kv(replace(SPEC, num_blocks=2**40, layers=(LAYER,)))

"""Kernels compile for GPUs where there is none, are kept where nobody else can write, and are launched as CuPy wants it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkv.backend_registry import load_backend
from streamkv.errors import BackendError
from streamkv_kernels import compile as compile_module
from streamkv_kernels.compile import ARCHITECTURES, architecture_for, compile_cubin, find_or_build, prebuild
from streamkv_kernels.cuda_device import CudaDevice
from streamkv_kernels.device import SOURCES, Variant

GATE = Variant("activation", (("IO", "bf16"), ("GELU", 0)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cubin_is_whole_and_says_what_it_takes() -> None:
    cubin, resources = compile_cubin(GATE, "sm_90")
    assert cubin.startswith(b"\x7fELF")
    assert list(resources) == ["gate"]
    assert 8 <= resources["gate"].registers <= 64
    assert resources["gate"].spilled == 0


def test_it_is_kept_under_a_name_that_says_all_that_decides(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_or_build(GATE, "sm_80")
    assert path.parent == cache
    monkeypatch.setattr(compile_module, "compile_cubin", lambda *_: pytest.fail("it is compiled again"))
    assert find_or_build(GATE, "sm_80") == path
    names = {path}
    for variant, architecture, version in (
        (Variant("activation", (("IO", "f16"), ("GELU", 0))), "sm_80", "13.0"),
        (GATE, "sm_90", "13.0"),
        (GATE, "sm_80", "99.9"),
    ):
        monkeypatch.setattr(compile_module, "compile_cubin", lambda *_: (b"other", {}))
        monkeypatch.setattr(compile_module, "compiler_version", lambda version=version: version)
        names.add(find_or_build(variant, architecture))
    assert len(names) == 4


def test_a_cubin_that_others_can_write_to_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "compile_cubin", lambda *_: (b"cubin", {}))
    find_or_build(GATE, "sm_80").chmod(0o722)
    with pytest.raises(BackendError, match="must belong to you and be writable by nobody else"):
        find_or_build(GATE, "sm_80")


def test_prebuilt_ones_need_neither_compiler_nor_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "_PREBUILT", tmp_path)
    (made,) = prebuild([GATE], ["sm_86"], tmp_path)
    monkeypatch.setattr(compile_module, "_core", lambda: pytest.fail("the compiler is asked for"))
    assert find_or_build(GATE, "sm_86") == made
    assert not cache.exists()


def _wheel(tree: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=tree, env={**os.environ, **environment}, check=True, capture_output=True, timeout=60)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_a_wheel_has_what_was_prebuilt_and_its_kernels_are_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree like the repository's, but that nothing is compiled for processors."""
    root, tree = Path(__file__).parents[2], tmp_path / "tree"
    if not (root / "backends" / "hatch_build.py").exists():
        pytest.skip("the sources are not there beside an installed wheel")
    prebuilt = tree / "kernels_cuda" / "streamkv_kernels" / "prebuilt"
    shutil.copytree(SOURCES, prebuilt.parent, ignore=shutil.ignore_patterns("prebuilt", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "backends/hatch_build.py", "streamkv/__init__.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tree / name)
    processors = tree / "backends" / "streamkv_backends" / "cpu"
    processors.mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("../__init__.py", ""), ("build.py", "def prebuild():\n    return []\n")):
        (processors / name).write_text(text)
    variants = [GATE, Variant("norm", (("IO", "f16"), ("ROW_THREADS", 32)))]
    made = {path.name: path.read_bytes() for path in prebuild(variants, ["sm_86", "sm_90"], prebuilt)}
    assert len(made) == 4

    without = _wheel(tree, tmp_path / "without", STREAMKV_PREBUILD="").namelist()
    assert "streamkv_kernels/norm.cu" in without
    assert not [name for name in without if name.endswith(".cubin")]

    _wheel(tree, tmp_path / "with", STREAMKV_PREBUILD="1").extractall(tmp_path / "installed")
    monkeypatch.setattr(compile_module, "_PREBUILT", tmp_path / "installed" / "streamkv_kernels" / "prebuilt")
    monkeypatch.setattr(compile_module, "_core", lambda: pytest.fail("the compiler is asked for"))
    found = [find_or_build(variant, architecture) for variant in variants for architecture in ("sm_86", "sm_90")]
    assert {path.name: path.read_bytes() for path in found} == made
    assert not cache.exists()


def test_kernels_are_prebuilt_for_known_architectures_only(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="there are no kernels for 'sm_70', only for sm_80, "):
        prebuild([GATE], ["sm_80", "sm_70"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_source_that_does_not_compile_is_one_sentence() -> None:
    with pytest.raises(BackendError, match=r"NVRTC cannot compile activation -DIO=nothing -DGELU=0 for sm_80: .*error.*nothing"):
        compile_cubin(Variant("activation", (("IO", "nothing"), ("GELU", 0))), "sm_80")


def test_a_missing_compiler_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(BackendError, match=r"compiled by NVRTC, which is missing; pip install 'streamkv\[gpu\]'"):
        find_or_build(GATE, "sm_80")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_a_gpu_runs_the_best_of_its_generation(capability: tuple[int, int], architecture: str) -> None:
    assert architecture_for(capability) == architecture


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_other_gpus_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(BackendError, match=rf"no kernels for GPUs of compute capability {capability[0]}\.{capability[1]}"):
        architecture_for(capability)


# ---------------------------------------------------------------- a GPU, played


@dataclass
class FakeFunction:
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    max_dynamic_shared_size_bytes: int = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: Any) -> None:
        self.calls.append((grid, block, args, shared_mem, stream.ptr))


class FakeModule:
    loaded: list[str]
    chosen: list[int]

    def __init__(self, path: str) -> None:
        self.loaded.append(path)
        self.functions: dict[str, FakeFunction] = {}

    def get_function(self, name: str) -> FakeFunction:
        return self.functions.setdefault(name, FakeFunction())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> type[FakeModule]:
    FakeModule.loaded = []
    chosen = FakeModule.chosen = []
    properties = types.SimpleNamespace(major=9, minor=0, name="A GPU", multi_processor_count=132)
    played = {
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1,
        "get_device_properties": lambda _: properties, "set_device": chosen.append,
        "current_stream": lambda _: types.SimpleNamespace(cuda_stream=next(streams)),
    }  # fmt: skip  # one line a thought
    streams = iter(range(1, 10))
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(RawModule=FakeModule))
    monkeypatch.setattr(compile_module, "compile_cubin", lambda *_: (b"cubin", {}))
    return FakeModule


def test_launches_reach_cupy_packed_and_on_the_stream_of_now(gpu: type[FakeModule], cache: Path) -> None:
    device = CudaDevice()
    assert (device.name, device.num_sms) == ("A GPU (sm_90)", 132)
    assert gpu.chosen == [0], "the thread's current GPU"
    kernel = device.kernel(GATE, "gate", 1024)
    assert device.kernel(GATE, "gate", 1024).function is kernel.function
    assert len(gpu.loaded) == 1
    assert Path(gpu.loaded[0]).parent == cache
    x = torch.zeros(4)
    bound = kernel.bind(x, None, 3, 0.5)
    bound.launch((2, 1, 1), (32, 1, 1))
    bound.launch((2, 1, 1), (32, 1, 1))
    expected = ((2, 1, 1), (32, 1, 1), (x.data_ptr(), 0, 3, 0.5), 1024)
    assert kernel.function.calls == [(*expected, 1), (*expected, 2)]
    assert [type(value) for value in kernel.function.calls[0][2]] == [int, int, int, float]


def test_much_shared_memory_is_asked_for_and_too_much_refused(gpu: type[FakeModule]) -> None:
    device = CudaDevice()
    assert device.kernel(GATE, "gate", 48 * 1024).function.max_dynamic_shared_size_bytes == 0
    assert device.kernel(GATE, "gate", 100_000).function.max_dynamic_shared_size_bytes == 100_000
    with pytest.raises(BackendError, match="activation needs 300000 bytes of shared memory, more than A GPU"):
        device.kernel(GATE, "gate", 300_000)


@pytest.mark.parametrize(
    ("what", "value", "says"),
    [
        ("torch.version.cuda", None, "this build of torch has no CUDA"),
        ("torch.cuda.is_available", lambda: False, "torch sees no GPU; see that nvidia-smi lists one"),
        ("torch.cuda.get_device_properties", lambda _: types.SimpleNamespace(major=7, minor=5), r"compute capability 7\.5"),
        ("cupy", None, r"the cuda backend needs CuPy .*pip install 'streamkv\[gpu\]'"),
    ],
)
def test_what_is_missing_is_one_sentence(
    gpu: type[FakeModule], monkeypatch: pytest.MonkeyPatch, what: str, value: Any, says: str
) -> None:
    if what == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", value)
    else:
        monkeypatch.setattr(what, value)
    with pytest.raises(BackendError, match=says):
        CudaDevice()
    with pytest.raises(BackendError, match=says):
        load_backend("cuda", "cuda")
    if what != "torch.cuda.is_available":
        monkeypatch.delenv("STREAMKV_CACHE")  # where the cpu backend's kernels are
        backend, reason = load_backend("auto")
        assert backend.name in {"cpu", "torch"}
        assert "the cuda backend cannot be used" in reason


def test_another_gpu_than_there_is_is_one_sentence(gpu: type[FakeModule]) -> None:
    with pytest.raises(BackendError, match="there is no GPU 3; torch sees 1"):
        CudaDevice("cuda:3")


def test_the_real_cupy_takes_a_cubin_and_asks_for_a_driver(tmp_path: Path) -> None:
    """As far as one comes without a GPU: the class is there and takes a path; a function needs a driver."""
    cupy = pytest.importorskip("cupy")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the tests that need one say more")
    (tmp_path / "gate.cubin").write_bytes(compile_cubin(GATE, "sm_80")[0])
    module = cupy.RawModule(path=str(tmp_path / "gate.cubin"))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        module.get_function("gate").max_dynamic_shared_size_bytes = 1


def test_importing_streamkv_imports_neither_cupy_nor_the_compiler() -> None:
    code = (
        "import sys, streamkv, streamkv.backend_registry, streamkv.engine, streamkv.cli, streamkv_kernels.cuda_device;"
        "import streamkv_backends.cuda.backend;"
        "print([name for name in sys.modules if name.startswith(('cupy', 'cuda.core', 'cuda.bindings.nvrtc'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_architectures_are_known_to_the_compiler() -> None:
    from cuda.bindings import nvrtc

    _, known = nvrtc.nvrtcGetSupportedArchs()
    assert {int(name[3:]) for name in ARCHITECTURES} <= set(known)

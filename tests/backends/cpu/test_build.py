"""Where the kernels' library comes from: compiled once, found again, never taken from where others could write."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from streamkv.code_cache import cache_folder
from streamkv.errors import BackendError
from streamkv_backends.cpu import build
from streamkv_backends.cpu.backend import CpuBackend
from streamkv_backends.cpu.native import load

PORTABLE = build.ISAS[-1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("STREAMKV_CACHE", str(folder))
    monkeypatch.setattr(build, "_PREBUILT", tmp_path / "none")
    return folder


def test_it_is_compiled_once_and_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.find_or_build(PORTABLE)
    assert made.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert list(cache.iterdir()) == [made], "nothing half done is left"
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.find_or_build(PORTABLE) == made
    assert CpuBackend(native=load(made)).name == "cpu"


def test_another_source_is_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    monkeypatch.setattr(build, "_SOURCES", sources)
    (sources / "one.cpp").write_text('extern "C" int answer() { return 1; }')
    first = build.find_or_build(PORTABLE)
    (sources / "one.cpp").write_text('extern "C" int answer() { return 2; }')
    assert build.find_or_build(PORTABLE) != first
    assert len(list(cache.iterdir())) == 2


def test_other_flags_are_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int answer() { return ANSWER; }')
    monkeypatch.setattr(build, "_SOURCES", sources)
    isas = [replace(PORTABLE, flags=(f"-DANSWER={answer}",)) for answer in (1, 2)]
    first, second = (build.find_or_build(isa) for isa in isas)
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [1, 2]
    assert build.find_or_build(isas[0]) == first


def test_a_prebuilt_one_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ISAS", (PORTABLE,))
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    (made,) = build.prebuild(tmp_path / "prebuilt")
    monkeypatch.setattr(build, "_PREBUILT", tmp_path / "prebuilt")
    assert build.find_or_build(PORTABLE) == made
    assert not cache.exists()


def test_a_folder_that_others_can_write_to_is_refused(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(
        BackendError, match="cache must belong to you and be writable by nobody else; repair it or set STREAMKV_CACHE"
    ):
        build.find_or_build(PORTABLE)


def test_a_library_that_others_can_write_to_is_refused(cache: Path) -> None:
    build.find_or_build(PORTABLE).chmod(0o722)
    with pytest.raises(BackendError, match="must belong to you and be writable by nobody else"):
        build.find_or_build(PORTABLE)


def test_a_library_of_somebody_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.find_or_build(PORTABLE)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(BackendError, match="must belong to you"):
        build.find_or_build(PORTABLE)


def test_no_folder_for_the_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match=r"cannot be made \(Not a directory\); set STREAMKV_CACHE to a folder of yours"):
        cache_folder()


def test_a_compiler_that_fails_is_one_sentence_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BackendError, match=r"cannot compile the cpu backend for portable \(no space left\); use --backend torch"):
        build.find_or_build(PORTABLE)
    assert list(cache.iterdir()) == []


def test_a_named_instruction_set_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.delenv("STREAMKV_CPU_ISA", raising=False)
    assert build.detect().name == "avx2"
    monkeypatch.setenv("STREAMKV_CPU_ISA", "portable")
    assert build.detect().name == "portable"
    monkeypatch.setenv("STREAMKV_CPU_ISA", "avx512")
    with pytest.raises(
        BackendError, match="STREAMKV_CPU_ISA is 'avx512', which this processor does not have; use one of avx2, portable"
    ):
        build.detect()


def test_one_openmp_team_serves_torch_and_the_kernels() -> None:
    """Two libgomps in a process would be two teams of threads on the same cores."""
    code = (
        "import torch; from streamkv_backends.cpu.native import library; library();"
        "maps = open('/proc/self/maps').read().split(); import sys;"
        "sys.exit(len({name for name in maps if 'libgomp' in name}) != 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0

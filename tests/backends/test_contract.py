"""The torch backend keeps the whole contract; a third party's keeps what its limits assert."""

from __future__ import annotations

import pytest
import torch

from streamkv.attention import Limits
from streamkv_backends.contract import Case, cases, check, check_refusals
from streamkv_backends.contract.__main__ import main
from streamkv_backends.torch_backend import TorchBackend
from tests.backends.third_party.streamkv_pebble import PebbleBackend

ALL = cases(TorchBackend().limits)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_torch_backend_keeps_the_contract(case: Case) -> None:
    check(TorchBackend(), case)


@pytest.mark.parametrize("backend", [TorchBackend(), PebbleBackend()], ids=lambda backend: backend.name)
def test_refuses_what_its_limits_exclude(backend: TorchBackend) -> None:
    check_refusals(backend)


@pytest.mark.smoke
def test_command_checks_a_backend_by_import_string(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["streamkv_backends.torch_backend:TorchBackend", "--only", "float32, decode, plain"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      float32, decode, plain, head_dim 64, blocks of 16",
        "1 checks, 0 failed",
    ]


def test_command_finds_an_installed_backend_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torch", "--only", "refusals"]) == 0
    assert main(["torch", "--only", "no case is called that"]) == 2
    with pytest.raises(SystemExit):
        main(["nonesuch"])
    assert "backend 'nonesuch' is not installed; there are cpu, cuda, torch, or package.module:Class" in capsys.readouterr().err


def test_cases_cover_what_is_promised() -> None:
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)
    assert {case.dtype for case in ALL} == {torch.float32, torch.bfloat16, torch.float16}
    assert {64, 80, 96, 128, 256} <= {layer.head_dim for case in ALL for layer in case.layers}
    assert {8, 16, 32} <= {case.block_size for case in ALL}
    heads = {(layer.num_heads, layer.num_kv_heads) for case in ALL for layer in case.layers}
    assert {(4, 4), (6, 2), (8, 1)} <= heads, "MHA, GQA, MQA"
    assert any(layer.has_sinks and layer.window for case in ALL for layer in case.layers)
    assert any(layer.soft_cap and layer.window for case in ALL for layer in case.layers)


LIMITS = {
    "as CUDA kernels have them": Limits(
        "cuda", frozenset({torch.bfloat16, torch.float16}), frozenset({64, 128}), frozenset({16, 32})
    ),
    "nothing but the plainest": Limits(
        "cpu", frozenset({torch.float32}), frozenset({128}), frozenset({16}), windows=False, soft_caps=False, sinks=False
    ),
    "an unusual head_dim and block size": Limits("cpu", frozenset({torch.float32}), frozenset({192}), frozenset({64})),
}


@pytest.mark.parametrize("name", LIMITS)
def test_cases_ask_for_all_that_limits_assert_and_for_nothing_else(name: str) -> None:
    limits = LIMITS[name]
    found = cases(limits)
    assert all(limits.refusal(case.spec) is None for case in found)
    assert {case.dtype for case in found} == limits.dtypes
    assert {layer.head_dim for case in found for layer in case.layers} == limits.head_dims
    assert {case.block_size for case in found} == limits.block_sizes
    assert any(layer.window for case in found for layer in case.layers) == limits.windows
    assert any(layer.soft_cap for case in found for layer in case.layers) == limits.soft_caps
    assert any(layer.has_sinks for case in found for layer in case.layers) == limits.sinks


def test_limits_without_a_known_dtype_are_no_free_pass() -> None:
    with pytest.raises(AssertionError, match="nothing to test"):
        cases(Limits("cpu", frozenset({torch.float64})))

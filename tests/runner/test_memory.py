"""The size of the KV pool: asked for in blocks, in bytes, or a share of what a measured step leaves free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkv.attention import KVSpec
from streamkv.backend_registry import load_backend
from streamkv.errors import ConfigError
from streamkv.runner import memory
from streamkv.runner.loader import LoadedModel, load_model
from tests.runner.tiny import save_tiny

BLOCK_BYTES = 2 * 3 * 2 * 32 * 4 * 16  # keys and values, layers, KV heads, head_dim, float32, slots


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    # What of it is mapped is a test of its own.
    return replace(load_model(save_tiny(tmp_path_factory.mktemp("model"))), mapped_bytes=0)


def blocks(model: LoadedModel, **changes: Any) -> int:
    settings: dict[str, Any] = {
        "block_size": 16,
        "num_blocks": None,
        "kv_cache_memory": None,
        "memory_fraction": 0.5,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 512,
    }
    return memory.num_blocks_for(model, load_backend("torch")[0], **(settings | changes))


def test_bytes_per_block(model: LoadedModel) -> None:
    assert KVSpec(1, 16, torch.float32, model.layers).bytes_per_block == BLOCK_BYTES


def test_asked_for_in_blocks_or_bytes(model: LoadedModel) -> None:
    assert blocks(model, num_blocks=7) == 7
    assert blocks(model, kv_cache_memory=5 * BLOCK_BYTES + 1) == 5
    with pytest.raises(ConfigError, match=f"{BLOCK_BYTES - 1} bytes holds no block of {BLOCK_BYTES}"):
        blocks(model, kv_cache_memory=BLOCK_BYTES - 1)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 50), (0.9, 90), (0.95, 95)])
def test_a_share_of_what_a_step_leaves_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, fraction: float, expected: int
) -> None:
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: 10 * BLOCK_BYTES)
    monkeypatch.setattr(memory, "free_memory", lambda _: 110 * BLOCK_BYTES)
    assert blocks(model, memory_fraction=fraction) == expected


def test_never_more_than_all_rows_at_full_length_and_never_less_than_one_request(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks(model) == 4 * 512 // 16
    monkeypatch.setattr(memory, "free_memory", lambda _: 40 * BLOCK_BYTES)
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: 0)
    with pytest.raises(ConfigError, match="holds 20 KV blocks and one request of 512 tokens needs 32; lower max_model_len"):
        blocks(model)


def test_free_memory_respects_the_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    unbounded = memory.free_memory(torch.device("cpu"))
    assert unbounded > 10_000_000
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert memory.free_memory(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 10_000_000


def test_page_cache_in_the_control_group_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nactive_file 500000\ninactive_file 2000000\nfile 9\n")
    assert memory.free_memory(torch.device("cpu")) == 3_500_000


def test_weights_that_lie_in_their_files_are_not_given_away(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: 0)
    monkeypatch.setattr(memory, "free_memory", lambda _: 100 * BLOCK_BYTES)
    assert blocks(replace(model, mapped_bytes=0)) == 50
    assert blocks(replace(model, mapped_bytes=20 * BLOCK_BYTES)) == 40


def test_a_step_is_measured_whatever_the_peak_was_before(model: LoadedModel) -> None:
    peak = torch.ones(100_000_000)  # 400 MB, as loading may have had
    del peak
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=64)
    assert 0 <= measured < 100_000_000


def test_a_large_step_is_measured(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ModelRunner, "warm_up", lambda *_: torch.ones(50_000_000).sum())
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=16)
    assert 190_000_000 < measured < 300_000_000


def test_where_the_peak_cannot_be_restarted_it_is_an_upper_bound(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "statm").write_text("9 1000 0 0 0 0 0\n")
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    9000 kB\n")
    (tmp_path / "clear_refs").mkdir()
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=16)
    assert measured == 9000 * 1024 - 1000 * memory.resource.getpagesize()  # type: ignore[attr-defined]  # imported there

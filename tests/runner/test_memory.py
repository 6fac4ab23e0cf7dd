"""The size of the KV pool: asked for in blocks, in bytes, or a share of what a measured step leaves free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamkv.attention import KVSpec, Recorder
from streamkv.backend_registry import load_backend
from streamkv.errors import ConfigError
from streamkv.runner import memory
from streamkv.runner.loader import LoadedModel, load_model
from streamkv.runner.sampling_tables import RowSampler
from streamkv_backends.torch_backend import TorchBackend
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
    backend = changes.pop("backend", None) or load_backend("torch")[0]
    return memory.num_blocks_for(model, backend, **(settings | changes))


def test_bytes_per_block(model: LoadedModel) -> None:
    assert KVSpec(1, 16, torch.float32, model.layers).bytes_per_block == BLOCK_BYTES


def test_asked_for_in_blocks_or_bytes(model: LoadedModel) -> None:
    assert blocks(model, num_blocks=7) == 7
    assert blocks(model, kv_cache_memory=5 * BLOCK_BYTES + 1) == 5
    with pytest.raises(ConfigError, match=f"{BLOCK_BYTES - 1} bytes holds no block of {BLOCK_BYTES}"):
        blocks(model, kv_cache_memory=BLOCK_BYTES - 1)


FACTS = st.integers(0, 2**40)


@given(free=FACTS, peak=FACTS, reserve=FACTS, fraction=st.floats(0.01, 0.95), bytes_per_block=st.integers(1, 2**26))
def test_a_pool_leaves_the_step_what_it_needs_and_wastes_no_block(fraction: float, bytes_per_block: int, **facts: int) -> None:
    count = memory.pool_blocks(**facts, fraction=fraction, bytes_per_block=bytes_per_block)
    left = facts["free"] - facts["peak"] - facts["reserve"]
    assert count >= 0
    if count:
        assert count * bytes_per_block <= left * fraction
    assert (count + 1) * bytes_per_block > left * fraction - 1
    more = facts | {"free": facts["free"] + bytes_per_block}
    assert memory.pool_blocks(**more, fraction=fraction, bytes_per_block=bytes_per_block) >= count


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"free": 1000, "peak": 0, "reserve": 0, "fraction": 0.5, "bytes_per_block": 10}, 50),
        ({"free": 1000, "peak": 200, "reserve": 100, "fraction": 0.5, "bytes_per_block": 10}, 35),
        ({"free": 1000, "peak": 200, "reserve": 801, "fraction": 0.5, "bytes_per_block": 10}, 0),
        ({"free": 1000, "peak": 999, "reserve": 0, "fraction": 0.9, "bytes_per_block": 1}, 0),
        ({"free": 79 << 30, "peak": 3 << 30, "reserve": 1 << 30, "fraction": 0.9, "bytes_per_block": 2 << 20}, 34560),
    ],
)
def test_the_size_of_a_pool(facts: dict[str, Any], expected: int) -> None:
    assert memory.pool_blocks(**facts) == expected


class Records(TorchBackend):
    """As one that will record three sizes of steps."""

    recorded_ahead = (1, 2, 4)

    def recorded_size(self, num_tokens: int) -> int | None:
        return None

    def recording_key(self, metadata: Any) -> Any:
        return None

    def record(self, function: Any, inputs: Any) -> Any:
        raise AssertionError("not here")

    def replay(self, recording: Any, inputs: Any, metadata: Any) -> Any:
        raise AssertionError("not here")


def test_what_will_be_recorded_has_its_memory_kept(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure_step", lambda *_, **__: 0)
    monkeypatch.setattr(memory, "free_memory", lambda _: 100 * BLOCK_BYTES)
    monkeypatch.setattr(memory, "_PER_RECORDING", 10 * BLOCK_BYTES)
    assert isinstance(Records("cpu"), Recorder)
    assert blocks(model) == 50
    assert blocks(model, backend=Records("cpu")) == 35


def test_the_worst_step_samples_for_every_row(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, their logits in float32, and what is left behind: the smallest of pools."""
    seen: list[tuple[int, ...]] = []
    sample = RowSampler.sample
    monkeypatch.setattr(RowSampler, "sample", lambda *given: (seen.append(tuple(given[3].shape)), sample(*given))[1])
    backend = load_backend("torch")[0]
    memory.measure_step(model, backend, block_size=16, num_tokens=40, num_seqs=7)
    assert seen == [(7, 300)]
    assert backend._pool.spec.num_blocks == 1


@pytest.mark.parametrize(
    ("fraction", "device", "expected"),
    [(0.6, "cpu", 60), (0.6, "cuda", 60), (0.95, "cpu", 95), (None, "cpu", 50), (None, "cuda", 90)],
)
def test_a_share_of_what_a_step_leaves_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, fraction: float | None, device: str, expected: int
) -> None:
    model = replace(model, device=torch.device(device))
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


def test_the_first_version_of_control_groups_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("4000000\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 9\nactive_file 500000\ninactive_file 2000000\n")
    assert memory.free_memory(torch.device("cpu")) == 3_500_000
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
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
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=64, num_seqs=4)
    assert 0 <= measured < 100_000_000


def test_a_large_step_is_measured(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ModelRunner, "warm_up", lambda *_: torch.ones(50_000_000).sum())
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=16, num_seqs=4)
    assert 190_000_000 < measured < 300_000_000


def test_where_the_peak_cannot_be_restarted_it_is_an_upper_bound(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "statm").write_text("9 1000 0 0 0 0 0\n")
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    9000 kB\n")
    (tmp_path / "clear_refs").mkdir()
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    measured = memory.measure_step(model, load_backend("torch")[0], block_size=16, num_tokens=16, num_seqs=4)
    assert measured == 9000 * 1024 - 1000 * memory.resource.getpagesize()  # type: ignore[attr-defined]  # imported there

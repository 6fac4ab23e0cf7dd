"""Recorded decode steps on the emulator: padded, replayed for other steps, and the same to the bit as the model's own passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from streamkv.attention import KVSpec
from streamkv.core.step import PENDING, Step
from streamkv.runner.loader import LoadedModel, load_model
from streamkv.runner.model_runner import Launched, ModelRunner
from streamkv.runner.params import RowParams
from streamkv.runner.recordings import Recordings
from streamkv.sampling_params import Sampling
from streamkv_backends.cuda.backend import CudaBackend
from streamkv_backends.cuda.graphs import SIZES, recorded_size
from streamkv_kernels.emulated import EmulatedDevice
from tests.runner.no_sync import NoSync, decide_as_on_a_gpu
from tests.runner.tiny import save_tiny

ROWS, BLOCKS, SIZE = 12, 8, 16
KINDS = (
    Sampling(max_tokens=99, temperature=0.0),
    Sampling(max_tokens=99, temperature=0.9, seed=3),
    Sampling(max_tokens=99, top_k=9, top_p=0.7, min_p=0.02, seed=4),
    Sampling(max_tokens=99, temperature=0.0, logprobs=2),
    Sampling(max_tokens=99, logit_bias=((5, 1.0),), min_tokens=4, stop_token_ids=(6,), seed=5),
)


@pytest.fixture(scope="module")
def backend(libraries: Path) -> CudaBackend:
    return CudaBackend("emulated", kernels=EmulatedDevice(cache=libraries))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, backend: CudaBackend) -> LoadedModel:
    folder = save_tiny(tmp_path_factory.mktemp("model"), head_dim=64, num_attention_heads=4, num_hidden_layers=2)
    return load_model(folder, dtype="float16", ops=backend.ops)


class Counting(ModelRunner):
    """Counts how often the model's Python ran, and keeps logits."""

    asked = 0
    recordings: Recordings

    def _ask_model(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return super()._ask_model(*inputs)

    def _forward(self, *inputs: np.ndarray) -> torch.Tensor:
        self.logits = super()._forward(*inputs)
        self.size = len(inputs[0])
        return self.logits


def runner_of(model: LoadedModel, backend: CudaBackend, *, records: bool = True) -> Counting:
    pool = backend.allocate_kv(KVSpec(ROWS * BLOCKS, SIZE, model.dtype, model.layers))
    runner = Counting(model, backend, pool, max_num_seqs=ROWS, max_model_len=BLOCKS * SIZE, late=True)
    assert runner._recordings is not None
    runner.recordings = runner._recordings
    if not records:
        runner._recordings = None
    return runner


class Driver:
    """Prompts of rows, then decodes; what a row samples is its next input."""

    def __init__(self, runner: Counting, *, shared: int = 0) -> None:
        self.runner, self.number, self.shared = runner, 0, shared
        self.length = dict.fromkeys(range(ROWS), 0)

    def prompt(self, row: int, length: int) -> tuple[int, ...]:
        tokens = [(3 + (0 if at < self.shared else 7 * row) + at * at) % 290 for at in range(length)]
        own = range(row * BLOCKS, (row + 1) * BLOCKS)
        shared = range(self.shared // SIZE)
        table = (*shared, *own[len(shared) :])
        step = Step(self.number, 0.0, [row], [0], [length], [1], tokens, [(row, str(row))], [(row, 0, table)])
        self.length[row] = length
        return self._run(step, {row: RowParams(KINDS[row % len(KINDS)], 0, tuple(tokens), length)})[0]

    def decode(self, rows: list[int]) -> list[tuple[int, ...]]:
        count = len(rows)
        step = Step(self.number, 0.0, rows, [self.length[row] for row in rows], [1] * count, [1] * count, [PENDING] * count)
        for row in rows:
            self.length[row] += 1
        return self._run(step, {})

    def _run(self, step: Step, params: dict[int, RowParams]) -> list[tuple[int, ...]]:
        self.number += 1
        return list(self.runner.run(step, params).tokens)


def played(driver: Driver) -> Iterator[tuple[object, torch.Tensor]]:
    """What comes out, and the logits: prompts of unlike lengths, then steps of all sizes over them."""
    for row in range(ROWS):
        yield driver.prompt(row, 5 + 6 * row), driver.runner.logits.clone()
    for count in (3, 4, 3, 7, 5, 12, 6, 3, 4, 8, 2, 1, 1, 2, 12, 9):
        rows = [(count + place) % ROWS for place in range(count)]
        yield driver.decode(rows), driver.runner.logits[:count].clone()


def test_sizes_are_padded_to_the_next_one_that_is_recorded() -> None:
    assert [recorded_size(count) for count in (1, 2, 3, 4, 5, 9, 65, 129, 512, 513)] == [1, 2, 4, 4, 8, 16, 80, 160, 512, None]
    assert list(SIZES) == sorted(set(SIZES))
    assert max(recorded_size(count) or 0 for count in range(1, 513)) == 512
    waste = [1 - count / (recorded_size(count) or count) for count in range(16, 513)]
    assert max(waste) < 0.3


def test_replayed_steps_are_the_models_own_to_the_bit(model: LoadedModel, backend: CudaBackend) -> None:
    plain = list(played(Driver(runner_of(model, backend, records=False))))
    runner = runner_of(model, backend)
    replayed = list(played(Driver(runner)))
    for (said, logits), (other, others) in zip(plain, replayed, strict=True):
        assert said == other
        # A product over more rows may be summed in another order by torch on a processor.
        assert (logits.float() - others.float()).abs().max() < 2e-3 * others.float().abs().max()
    assert runner.recordings.off is None
    assert sorted(runner.recordings.sizes) == [(size, size) for size in (1, 2, 4, 8, 16)]


def test_the_models_python_runs_no_more_once_a_size_is_proved(model: LoadedModel, backend: CudaBackend) -> None:
    runner = runner_of(model, backend)
    driver = Driver(runner)
    for row in range(4):
        driver.prompt(row, 20 + row)
    for _ in range(4):
        driver.decode([0, 1, 2])
    asked = runner.asked
    for rows in ([0, 1, 2], [1, 2, 3], [3, 2, 1, 0], [2, 0, 3]):
        driver.decode(rows)
        assert runner.size == 4
    assert runner.asked == asked


def test_steps_with_other_launches_are_other_recordings(model: LoadedModel, backend: CudaBackend) -> None:
    """Behind a shared prefix a layer launches more: neither may stand in for the other."""
    rows = list(range(5))

    def tokens(runner: Counting) -> list[list[tuple[int, ...]]]:
        said = []
        for shared in (0, 64):
            driver = Driver(runner, shared=shared)
            driver.number = 1000 * shared
            for row in rows:
                driver.prompt(row, 66 + row)
            said += [driver.decode(rows) for _ in range(5)]
        return said

    plain = tokens(runner_of(model, backend, records=False))
    runner = runner_of(model, backend)
    assert tokens(runner) == plain
    assert runner.recordings.off is None
    assert runner.recordings.sizes == [(8, 8), (8, 8)]


def test_a_graph_is_not_used_after_what_it_reads_has_moved(model: LoadedModel, backend: CudaBackend) -> None:
    runner = runner_of(model, backend)
    driver = Driver(runner)
    for row in range(2):
        driver.prompt(row, 20 + row)
    for _ in range(4):
        driver.decode([0, 1])
    generation = backend.generation
    backend.generation += 1  # as when a step has more sequences than there was room for
    said = [driver.decode([0, 1]) for _ in range(3)]
    assert runner.recordings.sizes == [(2, 2), (2, 2)]
    backend.generation = generation
    plain = Driver(runner_of(model, backend, records=False))
    for row in range(2):
        plain.prompt(row, 20 + row)
    assert [plain.decode([0, 1]) for _ in range(7)][4:] == said


def test_sizes_are_recorded_ahead_while_nothing_is_to_be_done(
    model: LoadedModel, backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaBackend, "recorded_ahead", property(lambda _: SIZES))
    runner = runner_of(model, backend)
    count = 0
    while runner.record_ahead():
        count += 1
    assert runner.recordings.sizes == [(size, size) for size in (16, 8, 4, 2, 1)]
    assert count == 5
    said = [one for one, _ in played(Driver(runner))]
    assert len(runner.recordings.sizes) == 5
    assert said == [one for one, _ in played(Driver(runner_of(model, backend, records=False)))]


def test_a_launch_waits_for_nothing(model: LoadedModel, backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a step's lists to sampled ids on the device: prompts through the model's Python, decodes replayed."""
    decide_as_on_a_gpu(monkeypatch)
    runner = runner_of(model, backend)
    plain: list[object] = []
    for _ in range(2):  # to record and to prove may wait
        plain = [one for one, _ in played(Driver(runner))]
    watched, launch = 0, runner.launch

    def watch(step: Step, params: dict[int, RowParams]) -> Launched:
        nonlocal watched
        watched += 1
        with NoSync(*model.module.parameters(), runner._last_token, runner.pool.blocks):
            return launch(step, params)

    monkeypatch.setattr(runner, "launch", watch)
    driver = Driver(runner)
    driver.number = 1000
    assert [one for one, _ in played(driver)] == plain
    assert watched == ROWS + 16

"""Recorded steps: trusted only after proof, given up rather than wrong, and never the reason that a step fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from streamkv.runner.recordings import Recordings

WRONG = 1000.0


class Backend:
    """Records anything and replays it as `replays` says; counts."""

    recorded_ahead = ()

    def __init__(self) -> None:
        self.replayed = self.recorded = 0
        self.replays: Callable[[torch.Tensor], torch.Tensor | None] = lambda own: own
        self.records = True

    def recorded_size(self, num_tokens: int) -> int | None:
        return num_tokens if num_tokens <= 64 else None

    def recording_key(self, metadata: Any) -> Any:
        return metadata if metadata != "not recorded" else None

    def record(self, function: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
        self.recorded += 1
        return function(*inputs), function if self.records else None

    def replay(self, recorded: Any, inputs: tuple[torch.Tensor, ...], metadata: Any) -> torch.Tensor | None:
        self.replayed += 1
        return self.replays(answer(*inputs))


def answer(tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (tokens + positions).float()[0][wanted]


class Model:
    """Counts how often its Python ran."""

    def __init__(self) -> None:
        self.asked = 0
        self.spoiled = False

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return answer(*inputs) * (float("nan") if self.spoiled else 1)


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def recordings(backend: Backend, model: Model) -> Recordings:
    return Recordings(backend, model)


def step(recordings: Recordings, size: int = 2, number: int = 1, wanted: int = 1, metadata: object = 0) -> bool:
    """Whether the step's result is the model's own."""
    inputs = (torch.full((1, size), number), torch.arange(size)[None], torch.arange(size - wanted, size))
    return torch.equal(recordings.run(inputs, metadata), answer(*inputs))


def test_a_size_is_recorded_when_it_comes_again_and_trusted_after_two_proofs(
    recordings: Recordings, backend: Backend, model: Model
) -> None:
    asked = []
    for number in range(5):
        assert step(recordings, number=number)
        asked.append(model.asked)
    # Once plain, once recorded and compared, once compared with the next step; from then on Python is not asked.
    assert asked == [1, 2, 3, 3, 3]
    assert backend.recorded == 1
    assert backend.replayed == 4
    assert recordings.sizes == [(2, 1)]


def test_rows_with_logits_are_part_of_the_size(recordings: Recordings) -> None:
    for wanted in ([1], [0, 1], [1], [0, 1]):
        recordings.run((torch.ones(1, 2), torch.ones(1, 2), torch.tensor(wanted)), 0)
    assert recordings.sizes == [(2, 1), (2, 2)]


@pytest.mark.parametrize("right", [0, 1], ids=["in the same step", "in the next step"])
def test_a_recording_that_gives_other_numbers_is_never_believed(recordings: Recordings, backend: Backend, right: int) -> None:
    backend.replays = lambda own: own if backend.replayed <= right else own + WRONG
    for number in range(6):
        assert step(recordings, number=number)
    assert recordings.off == "a recording gave other numbers than the model"
    assert recordings.sizes == []
    assert backend.replayed == right + 1


def test_a_step_that_is_not_finite_proves_nothing_and_refutes_nothing(
    recordings: Recordings, backend: Backend, model: Model
) -> None:
    step(recordings)
    model.spoiled = True
    for _ in range(3):
        step(recordings)
    assert recordings.off is None
    model.spoiled = False
    asked = model.asked
    for number in range(4):
        assert step(recordings, number=number)
    assert model.asked == asked + 2, "both proofs were still owed"


def test_a_path_that_python_decides_differently_goes_through_python(
    recordings: Recordings, backend: Backend, model: Model
) -> None:
    for _ in range(4):
        step(recordings)
    backend.replays = lambda own: None
    asked = model.asked
    for number in range(8):
        assert step(recordings, number=number)
    assert model.asked == asked + 8
    backend.replays = lambda own: own
    assert step(recordings)
    assert model.asked == asked + 8, "eight detours in a row are no reason to give up"
    backend.replays = lambda own: None
    for number in range(12):
        assert step(recordings, number=number)
    assert recordings.off == "the model's Python decides by what it computes"
    assert backend.replayed == 3 + 8 + 1 + 9


def test_a_model_that_cannot_be_recorded_is_left_alone(recordings: Recordings, backend: Backend) -> None:
    backend.records = False
    for number in range(4):
        assert step(recordings, number=number)
    assert recordings.off == "the model's Python reads what it computes"
    assert backend.recorded == 1


def test_large_steps_are_not_recorded(recordings: Recordings, backend: Backend) -> None:
    for _ in range(3):
        assert step(recordings, size=65)
        assert step(recordings, size=64)
    assert recordings.sizes == [(64, 1)]


def test_the_least_recently_used_recording_goes_first(recordings: Recordings, backend: Backend) -> None:
    for size in range(1, 65):
        for _ in range(2):
            step(recordings, size=size)
    step(recordings, size=1)
    for _ in range(2):
        step(recordings, size=40, wanted=2)
    assert len(recordings.sizes) == 64
    assert (1, 1) in recordings.sizes
    assert (2, 1) not in recordings.sizes


def test_what_was_met_once_is_forgotten_after_a_while(recordings: Recordings, backend: Backend) -> None:
    step(recordings, size=3)
    for wanted in range(256):
        recordings.run((torch.ones(1, 2), torch.ones(1, 2), torch.zeros(wanted, dtype=torch.long)), 0)
    step(recordings, size=3)
    assert backend.recorded == 0


# -- failures -------------------------------------------------------------------------------------------------------------------


def fail(*_: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize("steps_before", [1, 2, 4], ids=["when it was made", "while it is proved", "when it is trusted"])
def test_a_recording_that_cannot_be_run_is_no_failed_step(recordings: Recordings, backend: Backend, steps_before: int) -> None:
    for _ in range(steps_before):
        step(recordings)
    backend.replays = fail
    for number in range(3):
        assert step(recordings, number=number)
    assert recordings.off == "a recording cannot be run"
    assert recordings.sizes == []


def test_a_model_that_cannot_be_looked_on_is_no_failed_step(recordings: Recordings, backend: Backend, model: Model) -> None:
    backend.record = fail  # type: ignore[method-assign]  # a planted fault
    for number in range(4):
        assert step(recordings, number=number)
    assert recordings.off == "the model cannot be looked on"
    assert model.asked == 4


def test_a_model_that_fails_by_itself_fails_its_step_and_nothing_else(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    recordings = Recordings(backend, lambda *inputs: model(*inputs) if not model.spoiled else fail())
    step(recordings)
    model.spoiled = True
    with pytest.raises(RuntimeError, match="planted"):
        step(recordings)
    model.spoiled = False
    assert recordings.off is None
    for number in range(4):
        assert step(recordings, number=number)
    assert recordings.sizes == [(2, 1)]


def test_what_the_backend_goes_by_is_part_of_the_size(recordings: Recordings, backend: Backend) -> None:
    for _ in range(2):
        for metadata in ("decode", "decode behind a prefix", "not recorded"):
            assert step(recordings, metadata=metadata)
    assert recordings.sizes == [(2, 1), (2, 1)]
    assert backend.recorded == 2


def test_a_size_recorded_ahead_is_there_when_it_comes_and_still_to_be_proved(
    recordings: Recordings, backend: Backend, model: Model
) -> None:
    inputs = (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
    assert recordings.ahead(inputs, 0)
    assert not recordings.ahead(inputs, 0)
    assert not recordings.ahead(inputs, "not recorded")
    assert model.asked == 1
    for number in range(3):
        assert step(recordings, number=number)
    assert (backend.recorded, backend.replayed) == (1, 4)
    assert model.asked == 2

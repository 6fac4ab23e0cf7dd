"""Results that come late, as a GPU's do: the next step is launched before the tokens of the one before are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkv.attention import KVSpec
from streamkv.core.step import PENDING, Step
from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.engine.engine import InProcessEngine
from streamkv.runner import model_runner
from streamkv.runner.loader import load_model
from streamkv.runner.model_runner import Launched, ModelRunner, SkippedStepError
from streamkv.runner.params import RowParams
from streamkv.runner.transfer import HostCopy
from streamkv.sampling_params import Sampling
from streamkv_backends.torch_backend import TorchBackend
from tests.engine.driving import Reader, run_all
from tests.runner.tiny import save_tiny

PENALTIES = {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"seed": 7},
    "cut": {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "seed": 3},
    "penalised": {"temperature": 0.0, **PENALTIES},
    "masked": {"seed": 5, "bad_words": ((7,), (3, 4)), "logit_bias": ((9, 2.0),), "min_tokens": 5, "stop_token_ids": (11, 12)},
    "told": {"seed": 1, "logprobs": 3},
    "scored": {"temperature": 0.0, "prompt_logprobs": 1},
}


class SlowCopy(HostCopy):
    """Never there until somebody waits for it."""

    waited = 0

    def ready(self) -> bool:
        return False


class LateRunner(ModelRunner):
    """As on a GPU: launches before it collects. Tells in which order."""

    order: list[tuple[str, int]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, late=True)
        LateRunner.order = []

    def _forward(self, *args: Any) -> torch.Tensor:
        self.order.append(("launch", len(args[0])))
        return super()._forward(*args)

    def collect(self, launched: Launched) -> Any:
        self.order.append(("collect", len(launched.batch.tokens)))
        return super().collect(launched)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamkv.engine.build.ModelRunner", LateRunner)
    monkeypatch.setattr(model_runner, "HostCopy", SlowCopy)


@asynccontextmanager
async def engine_of(folder: Path, **options: Any) -> AsyncIterator[InProcessEngine]:
    settings: dict[str, Any] = {"backend": "torch", "dtype": "float32", "num_blocks": 64, "block_size": 8, "max_model_len": 128}
    async with build_engine(EngineConfig(model=str(folder), poison=True, **(settings | options))) as engine:
        yield engine


def requests(count: int) -> list[EngineRequest]:
    """`count` of each kind, of unlike lengths."""
    made = []
    for index in range(count):
        for kind, (name, options) in enumerate(KINDS.items()):
            prompt = [(5 * kind + 3 * index + place * place) % 290 for place in range(6 + 9 * index + kind)]
            sampling = Sampling(max_tokens=6 + 4 * kind + index, **options)
            made.append(EngineRequest((f"{name}{index}",), prompt, sampling))
    return made


async def outcome(folder: Path, **options: Any) -> dict[str, Any]:
    async with engine_of(folder, **options) as engine:
        collected = await run_all(engine, requests(3))
        stats = await engine.stats()
        assert stats.blocks_used == 0
        assert (stats.preemptions > 0) == ("num_blocks" in options)
    return {
        name: (
            one.tokens,
            one.last.finish_reason,
            [(each.logprobs, each.prompt_logprobs) for each in one.outputs if each.logprobs],
        )
        for name, one in collected.items()
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_seqs": 3}, {"num_blocks": 17}, {"look_ahead": False}, {"speculation": "ngram"}],
    ids=["all at once", "rows change hands", "preempted", "one step at a time", "with drafts"],
)
async def test_late_results_are_the_same(options: dict[str, Any], folder: Path, request: pytest.FixtureRequest) -> None:
    own = await outcome(folder, **options)
    request.getfixturevalue("late")
    assert await outcome(folder, **options) == own


async def test_a_step_is_launched_before_the_one_before_is_collected_unless_its_rows_need_that(folder: Path, late: None) -> None:
    for kind, behind in (("greedy", True), ("masked", False), ("penalised", False)):
        async with engine_of(folder) as engine:
            await run_all(engine, [EngineRequest(("a",), [1, 2, 3, 4, 5, 6, 7], Sampling(max_tokens=8, **KINDS[kind]))])
            steps = [what for what, _ in LateRunner.order]
        assert Counter(steps) == {"launch": 8, "collect": 8}
        expected = ["launch", *["launch", "collect"] * 7, "collect"] if behind else ["launch", "collect"] * 8
        assert steps == expected, kind


async def test_a_device_that_fails_while_a_step_is_collected_costs_nobody_a_token(
    folder: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await outcome(folder)
    waits = 0

    def wait(copy: HostCopy) -> tuple[torch.Tensor, ...]:
        nonlocal waits
        waits += 1
        if waits in (3, 9):
            raise RuntimeError("the device failed")
        return HostCopy.wait(copy)

    monkeypatch.setattr(SlowCopy, "wait", wait)
    assert await outcome(folder) == own
    assert waits > 9


async def test_a_request_that_is_cancelled_between_launch_and_collection_ends_once(folder: Path, late: None) -> None:
    async with engine_of(folder, max_num_seqs=2) as engine:
        reader = Reader(engine)
        for each in requests(2):
            await engine.submit(each)
        await reader.tokens("drawn0", 2)
        await engine.cancel("drawn0")
        collected = await reader.finished([each.ids[0] for each in requests(2)])
        assert collected["drawn0"].last.finish_reason == "cancelled"
        assert (await engine.stats()).blocks_used == 0


def test_tokens_of_a_request_that_has_left_its_row_do_not_count_for_the_next_one(folder: Path) -> None:
    model = load_model(folder, dtype="float32")
    backend = TorchBackend()
    pool = backend.allocate_kv(KVSpec(8, 8, model.dtype, model.layers))
    params = RowParams(Sampling(max_tokens=9, temperature=0.0, presence_penalty=100.0), 0, (1, 2), 2)

    def first(index: int, pending: list[Launched]) -> tuple[int, ...]:
        """What a request samples first in a step that others' tokens are collected in."""
        runner = ModelRunner(
            model,
            backend,
            pool,
            max_num_seqs=1,
            max_model_len=64,
            late=True,
            on_pass=lambda: [each.collect() for each in pending],
        )
        steps = [
            Step(number, 0.0, [0], [0], [2], [1], [1, 2], [(0, str(number))], [(0, 0, (number,))]) for number in range(index + 1)
        ]
        pending += [runner.launch(step, {0: params}) for step in steps[:-1]]
        return runner.launch(steps[-1], {0: params}).collect().tokens[0]

    assert first(1, []) == first(0, [])


def failing(_copy: HostCopy) -> tuple[torch.Tensor, ...]:
    raise RuntimeError("the device failed")


def test_what_was_launched_before_the_device_failed_is_skipped_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder, dtype="float32")
    backend = TorchBackend()
    pool = backend.allocate_kv(KVSpec(8, 8, model.dtype, model.layers))
    runner = ModelRunner(model, backend, pool, max_num_seqs=1, max_model_len=64, late=True)
    params = RowParams(Sampling(max_tokens=9, temperature=0.0), 0, (1, 2), 2)
    first = runner.launch(Step(0, 0.0, [0], [0], [2], [1], [1, 2], [(0, "a")], [(0, 0, (0,))]), {0: params})
    second = runner.launch(Step(1, 0.0, [0], [2], [1], [1], [PENDING]), {})
    length = runner._sampler._length.copy()
    with monkeypatch.context() as patched:
        patched.setattr(HostCopy, "wait", failing)
        with pytest.raises(RuntimeError):
            first.collect()
    with pytest.raises(SkippedStepError):
        second.collect()
    assert (runner._sampler._length == length).all()
    with pytest.raises(SkippedStepError):
        runner.launch(Step(2, 0.0, [0], [3], [1], [1], [PENDING]), {})

"""Speculation changes how many steps an answer takes and nothing else, whatever the parameters; some requests it leaves alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.engine.engine import InProcessEngine
from streamkv.errors import ConfigError
from streamkv.sampling_params import Sampling
from tests.engine.driving import run_all
from tests.runner.tiny import save_tiny

PIECE = [11, 12, 13, 14, 15, 16, 17, 18]
PROMPTS = [PIECE * 3, [5, 6, 7, *PIECE, 9, *PIECE[:4]], list(range(40)), [3]]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "cut": {"top_k": 20, "top_p": 0.9, "seed": 6},
    "colder": {"temperature": 0.3, "min_p": 0.1, "seed": 7},
    "ended": {"temperature": 0.0, "stop_token_ids": tuple(range(0, 300, 9))},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3},
    "log-probabilities": {"temperature": 0.0, "logprobs": 2},
    "biased": {"temperature": 0.0, "logit_bias": ((4, 3.0),)},
}
LEFT_ALONE = ("penalties", "log-probabilities", "biased")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[True, False], ids=["look-ahead", "one by one"])
async def pair(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[tuple[InProcessEngine, InProcessEngine]]:
    options: dict[str, Any] = {"model": str(folder), "num_blocks": 120, "look_ahead": request.param, "poison": True}
    async with (
        build_engine(EngineConfig(**options)) as plain,
        build_engine(EngineConfig(**options, speculation="ngram")) as drafting,
    ):
        yield plain, drafting


async def said(engine: InProcessEngine, sampling: Sampling) -> list[tuple[list[int], str | None]]:
    requests = [EngineRequest((f"r{i}/0", f"r{i}/1"), prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    outputs = await run_all(engine, requests)
    return [(outputs[name].tokens, outputs[name].last.finish_reason) for request in requests for name in request.ids]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_tokens_are_the_same(pair: tuple[InProcessEngine, InProcessEngine], kind: str) -> None:
    plain, drafting = pair
    sampling = Sampling(max_tokens=60, **KINDS[kind])
    assert await said(drafting, sampling) == await said(plain, sampling)
    assert (await plain.stats()).drafts == 0
    stats = await drafting.stats()
    if kind in LEFT_ALONE:
        assert stats.drafts == 0
    elif kind == "greedy":
        assert stats.accepted_tokens > 0, "a tiny model repeats itself, and nothing was found"


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="speculation must be off or ngram"):
        EngineConfig(speculation="magic")  # type: ignore[arg-type]  # that is the point

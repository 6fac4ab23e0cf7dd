"""Greedy tokens of every family equal `transformers.generate`: alone, batched, chunked, cold, warm and preempted (float32)."""

from __future__ import annotations

import pytest

from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import Sampling
from tests.engine.driving import run_all
from tests.runner.families import FAMILIES, MAX_TOKENS, MORE, Family, TinyModel, build

GREEDY = Sampling(max_tokens=MAX_TOKENS, temperature=0.0)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, TinyModel]:
    return make(FAMILIES[request.param], tmp_path_factory)


@pytest.fixture(scope="module", params=MORE)
def further(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, TinyModel]:
    return make(MORE[request.param], tmp_path_factory)


def make(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, TinyModel]:
    model = build(family, tmp_path_factory.mktemp("family"))
    assert len({tuple(tokens) for tokens in model.expected}) == len(model.expected), "the model says the same to several prompts"
    assert sum(len(set(tokens)) for tokens in model.expected) > len(model.expected) * MAX_TOKENS // 2, "the model repeats itself"
    return family, model


def engine(case: tuple[Family, TinyModel], **settings: object) -> EngineConfig:
    family, model = case
    options = {"model": str(model.folder), "max_model_len": family.max_model_len, "poison": True, "num_blocks": 200}
    return EngineConfig(**(options | settings))  # type: ignore[arg-type]  # options by name


def requests(model: TinyModel, prefix: str) -> list[EngineRequest]:
    return [EngineRequest((f"{prefix}{i}",), prompt, GREEDY) for i, prompt in enumerate(model.prompts)]


async def test_batched_and_chunked_cold_then_warm(case: tuple[Family, TinyModel]) -> None:
    await chunked_twice(case)


async def test_further_families_batched_and_chunked_cold_then_warm(further: tuple[Family, TinyModel]) -> None:
    await chunked_twice(further)


async def chunked_twice(case: tuple[Family, TinyModel]) -> None:
    _, model = case
    async with build_engine(engine(case, block_size=5, max_num_batched_tokens=13, max_num_seqs=5)) as running:
        for turn in ("cold", "warm"):
            outputs = await run_all(running, requests(model, turn))
            assert [outputs[f"{turn}{i}"].tokens for i in range(len(model.expected))] == model.expected, turn
        stats = await running.stats()
    written = sum(len(prompt) // 5 * 5 for prompt in model.prompts)
    assert stats.cached_tokens > written * 0.8


async def test_alone(case: tuple[Family, TinyModel]) -> None:
    _, model = case
    async with build_engine(engine(case, block_size=16, enable_prefix_caching=False)) as running:
        for index, request in enumerate(requests(model, "a")):
            (output,) = (await run_all(running, [request])).values()
            assert output.tokens == model.expected[index]


async def test_preempted(case: tuple[Family, TinyModel]) -> None:
    _, model = case
    longest = max(len(prompt) for prompt in model.prompts) + MAX_TOKENS
    config = engine(case, block_size=3, num_blocks=longest // 3 + 2, max_num_batched_tokens=64, max_num_seqs=8)
    async with build_engine(config) as running:
        outputs = await run_all(running, requests(model, "p"))
        stats = await running.stats()
    assert [outputs[f"p{i}"].tokens for i in range(len(model.expected))] == model.expected
    assert stats.preemptions > 0


@pytest.mark.parametrize("name", ["Llama, rope longrope", "Gemma 3, longrope", "Phi-3, longrope"])
async def test_a_short_sequence_has_the_same_rope_alone_and_beside_a_long_one(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = make(FAMILIES[name], tmp_path_factory)
    _, model = case
    short = EngineRequest(("s",), [7, 42, 3, 99, 250, 18], GREEDY)
    async with build_engine(engine(case, enable_prefix_caching=False)) as running:
        alone = (await run_all(running, [short]))["s"].tokens
    async with build_engine(engine(case, enable_prefix_caching=False)) as running:
        beside = (await run_all(running, [*requests(model, "l"), short]))["s"].tokens
    assert alone == beside

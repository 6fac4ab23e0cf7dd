"""One Llama in depth: many prompts, forks, seeds and settings of the engine; every other family is in test_families.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from streamkv.engine.api import EngineRequest
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.sampling_params import Sampling
from tests.engine.driving import run_all
from tests.runner.tiny import VOCAB, generate, save_tiny

MAX_TOKENS = 12
GREEDY = Sampling(max_tokens=MAX_TOKENS, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def prompts() -> list[list[int]]:
    """Lengths around block borders, half of them with a common prefix that ends inside a block."""
    source = random.Random(7)
    base = [source.randrange(VOCAB) for _ in range(90)]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 70]
    own = [[source.randrange(VOCAB) for _ in range(length)] for length in lengths]
    shared = [base[: 5 + 9 * i] + [source.randrange(VOCAB) for _ in range(i)] for i in range(8)]
    return own + shared + [shared[5]]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    outputs = [generate(model, prompt, MAX_TOKENS) for prompt in prompts()]
    assert len({tuple(output) for output in outputs}) > len(outputs) // 2, "the model says the same to everybody"
    return outputs


def requests(prefix: str = "r") -> list[EngineRequest]:
    return [EngineRequest((f"{prefix}{i}",), prompt, GREEDY) for i, prompt in enumerate(prompts())]


SETTINGS = {
    "batched": EngineConfig(num_blocks=200),
    "batched, no look-ahead": EngineConfig(num_blocks=200, look_ahead=False),
    "no prefix cache": EngineConfig(num_blocks=200, enable_prefix_caching=False),
    "chunked": EngineConfig(num_blocks=200, max_num_batched_tokens=7, max_num_seqs=5),
    "small blocks": EngineConfig(num_blocks=400, block_size=4, max_num_batched_tokens=50, max_num_seqs=20),
    "preempted": EngineConfig(num_blocks=24, block_size=4, max_num_batched_tokens=64, max_num_seqs=16),
}


@pytest.mark.parametrize("name", SETTINGS)
async def test_tokens_equal_generate(name: str, model: Path, expected: list[list[int]]) -> None:
    config = SETTINGS[name]
    config = EngineConfig(**{f: getattr(config, f) for f in config.__slots__} | {"model": str(model), "poison": True})
    async with build_engine(config) as engine:
        outputs = await run_all(engine, requests())
        stats = await engine.stats()
    assert [outputs[f"r{i}"].tokens for i in range(len(expected))] == expected
    assert stats.blocks_used == 0
    assert (stats.preemptions > 0) == (name == "preempted")
    assert (stats.cached_tokens > 0) == (name != "no prefix cache")


@pytest.mark.smoke
async def test_alone_cold_then_warm(model: Path, expected: list[list[int]]) -> None:
    async with build_engine(EngineConfig(model=str(model), num_blocks=300, poison=True)) as engine:
        for turn in ("cold", "warm"):
            for index, request in enumerate(requests(turn)):
                (output,) = (await run_all(engine, [request])).values()
                assert output.tokens == expected[index]
                if turn == "warm":
                    # Every whole block that the cold run wrote, but never the prompt's last token.
                    written = (len(request.prompt) + MAX_TOKENS - 1) // 16 * 16
                    assert output.cached is not None
                    assert output.cached >= min(len(request.prompt) - 1, written)
                    assert output.cached < len(request.prompt)


async def test_forked_samples_equal_the_single_one(model: Path, expected: list[list[int]]) -> None:
    index = 9
    prompt = prompts()[index]
    async with build_engine(EngineConfig(model=str(model), num_blocks=100, poison=True)) as engine:
        ids = tuple(f"s{branch}" for branch in range(4))
        outputs = await run_all(engine, [EngineRequest(ids, prompt, GREEDY)])
        stats = await engine.stats()
    assert [outputs[i].tokens for i in ids] == [expected[index]] * 4
    # The prompt was computed once: its samples recompute one token each.
    assert stats.cached_tokens == 3 * (len(prompt) - 1)


async def test_seeded_samples_do_not_depend_on_the_batch(model: Path) -> None:
    sampling = Sampling(max_tokens=10, temperature=0.9, top_k=50, top_p=0.95, seed=11)
    prompt = prompts()[5]
    async with build_engine(EngineConfig(model=str(model), num_blocks=300)) as engine:
        (alone,) = (await run_all(engine, [EngineRequest(("x",), prompt, sampling)])).values()
        crowd = [*requests("c"), EngineRequest(("y",), prompt, sampling)]
        crowded = await run_all(engine, crowd)
        samples = await run_all(engine, [EngineRequest(("n0", "n1", "n2"), prompt, sampling)])
    assert crowded["y"].tokens == alone.tokens
    assert samples["n0"].tokens == alone.tokens
    assert len({tuple(sample.tokens) for sample in samples.values()}) == 3, "samples of one prompt must differ"

"""What is wanted of a prompt: log-probabilities, scores and vectors equal transformers' own, whatever runs beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from streamkv import LLM, SamplingParams
from streamkv.errors import ContextLengthError, InvalidRequestError
from streamkv.sampling_params import Pooling
from tests.llm.conftest import SETTINGS

PROMPTS = [[7], [1, 2, 3], list(range(5, 45)), list(range(100, 240))]
"""In tokens; the last is longer than the budget of the small engine below, and none of them fills its blocks."""

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module", params=["roomy", "chunked and crowded"])
def small(request: pytest.FixtureRequest, folder: Path, shared: LLM) -> Any:
    """The shared engine, and one that cuts prompts into chunks of a few tokens and has too few blocks for all."""
    if request.param == "roomy":
        yield shared
        return
    settings = SETTINGS | {"num_blocks": 40, "max_num_batched_tokens": 24, "max_num_seqs": 6}
    with LLM(str(folder), **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def logits(folder: Path) -> list[torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def hidden(folder: Path) -> list[torch.Tensor]:
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


def own(reference: torch.Tensor, prompt: list[int]) -> list[float]:
    """Log-probability of every token but the first."""
    return [float(reference[position, token]) for position, token in enumerate(prompt[1:])]


# -- log-probabilities of the prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0, 4])
def test_prompt_logprobs_are_those_of_transformers(small: LLM, logits: list[torch.Tensor], top: int) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=top)
    outputs = small.generate(PROMPTS * 2, params, use_tqdm=False)
    for output, reference in zip(outputs, logits * 2, strict=True):
        assert output.prompt_logprobs is not None
        first, *rest = output.prompt_logprobs
        assert first is None, "nothing comes before the first token"
        assert [entry.chosen for entry in rest if entry] == pytest.approx(own(reference, output.prompt_token_ids), abs=1e-4)
        assert len(rest) == len(output.prompt_token_ids) - 1
        for position, entry in enumerate(rest):
            assert entry is not None
            assert [token for token, _ in entry.top] == reference[position].topk(top).indices.tolist()
            better = int((reference[position] > reference[position, output.prompt_token_ids[position + 1]]).sum())
            assert entry.rank == better + 1
        assert len(output.outputs[0].token_ids) == 3
        assert output.num_cached_tokens == 0, "the cache must not be read: its blocks have no logits"


def test_asking_for_prompt_logprobs_changes_no_token(small: LLM) -> None:
    plain = small.generate(PROMPTS, GREEDY, use_tqdm=False)
    asked = small.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=2), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in asked] == [output.outputs[0].token_ids for output in plain]


def test_without_tokens_to_generate_only_the_prompt_is_computed(llm: LLM) -> None:
    (output,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3


def test_samples_share_the_prompts_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=2, prompt_logprobs=1, seed=4)
    (output,) = llm.generate([PROMPTS[2]], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPTS[2])
    assert [len(sample.token_ids) for sample in output.outputs] == [2, 2, 2]


def test_echo_begins_the_text_with_the_prompt(llm: LLM) -> None:
    text = "the quick brown fox"
    (plain,) = llm.generate(text, GREEDY, use_tqdm=False)
    (echoed,) = llm.generate(text, SamplingParams(max_tokens=6, temperature=0.0, echo=True, logprobs=1), use_tqdm=False)
    assert echoed.outputs[0].text == text + plain.outputs[0].text
    assert echoed.outputs[0].token_ids == plain.outputs[0].token_ids
    assert echoed.prompt_logprobs is not None
    assert len(echoed.prompt_logprobs) == len(echoed.prompt_token_ids)
    (alone,) = llm.generate(text, SamplingParams(max_tokens=0, echo=True), use_tqdm=False)
    assert (alone.outputs[0].text, alone.prompt_logprobs) == (text, None)


# -- scores -------------------------------------------------------------------------------------------------------------


def test_scores_are_sums_of_log_probabilities(small: LLM, logits: list[torch.Tensor]) -> None:
    scores = small.score(PROMPTS[1:], use_tqdm=False)
    for score, prompt, reference in zip(scores, PROMPTS[1:], logits[1:], strict=True):
        expected = own(reference, prompt)
        assert score.token_ids == prompt[1:]
        assert [entry.chosen for entry in score.logprobs] == pytest.approx(expected, abs=1e-4)
        assert score.logprob == pytest.approx(sum(expected), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)


def test_after_a_context_only_the_text_counts(small: LLM, logits: list[torch.Tensor]) -> None:
    prompt, reference = PROMPTS[3], logits[3]
    for cut in (1, 7, 8, 25, len(prompt) - 1):
        (score,) = small.score([prompt[cut:]], context=prompt[:cut], use_tqdm=False)
        assert score.token_ids == prompt[cut:]
        assert score.logprob == pytest.approx(sum(own(reference, prompt)[cut - 1 :]), abs=1e-3)
        assert len(score.logprobs) == len(score.token_ids)


def test_choices_are_ranked(llm: LLM) -> None:
    context = "the quick brown"
    (best,) = llm.generate(context, GREEDY, use_tqdm=False)
    likely = best.outputs[0].token_ids
    ids = best.prompt_token_ids
    choices = [[likely[0] + 1, *likely[1:]], likely, [(token + 7) % 400 for token in likely]]
    scores = llm.score(choices, context=ids, use_tqdm=False)
    assert scores[1].rank == 1, "what greedy sampling says is the most probable"
    assert sorted(score.rank for score in scores) == [1, 2, 3]
    assert [score.rank for score in sorted(scores, key=lambda score: -score.logprob)] == [1, 2, 3]


def test_texts_are_tokenised_together_with_their_context(llm: LLM) -> None:
    tokenizer = llm._engine.streams.tokenizer
    whole = tokenizer.encode("the quick brown fox")
    for context, text in (("the quick", " brown fox"), ("the quick ", "brown fox")):
        (score,) = llm.score(text, context=context, use_tqdm=False)
        assert score.token_ids == whole[len(tokenizer.encode("the quick")) :]


def test_what_cannot_be_scored_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="no token that could be scored"):
        llm.score([[5]], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.score([""], use_tqdm=False)
    with pytest.raises(ContextLengthError):
        llm.score([[1] * 257], use_tqdm=False)
    assert len(llm.score([[1] * 256], use_tqdm=False)[0].token_ids) == 255, "a full context generates nothing and fits"


# -- embeddings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_transformers_hidden_states(small: LLM, hidden: list[torch.Tensor], pooling: Pooling) -> None:
    outputs = small.embed(PROMPTS * 2, pooling=pooling, normalize=False, use_tqdm=False)
    for output, prompt, states in zip(outputs, PROMPTS * 2, hidden * 2, strict=True):
        expected = states[-1] if pooling == "last" else states.mean(dim=0)
        assert output.prompt_token_ids == prompt
        torch.testing.assert_close(torch.tensor(output.embedding), expected, atol=1e-4, rtol=1e-4)


def test_embeddings_have_length_one_unless_asked_otherwise(llm: LLM) -> None:
    raw, scaled = llm.embed("the dog", normalize=False, use_tqdm=False), llm.embed("the dog", use_tqdm=False)
    length = math.hypot(*raw[0].embedding)
    assert math.hypot(*scaled[0].embedding) == pytest.approx(1.0)
    assert [value * length for value in scaled[0].embedding] == pytest.approx(raw[0].embedding)


def test_an_unknown_pooling_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="pooling must be one of mean, last"):
        llm.embed("a", pooling="max", use_tqdm=False)  # type: ignore[arg-type]  # that is the point


async def test_embeddings_scores_and_generation_share_steps_and_leave_the_cache_alone(folder: Path) -> None:
    import asyncio

    from streamkv import Engine
    from streamkv.engine.config import EngineConfig

    prompt = PROMPTS[3]
    async with Engine(EngineConfig(model=str(folder), **SETTINGS | {"max_num_batched_tokens": 64})) as engine:

        async def generated() -> list[int]:
            async for output in engine.generate(list(prompt), GREEDY):
                result = output
            return result.outputs[0].token_ids

        alone = await generated()  # its blocks are cached now
        before = await engine.streams.client.stats()
        results = await asyncio.gather(
            generated(), engine.embed(list(prompt)), engine.score(list(prompt)), engine.embed(list(prompt), pooling="mean")
        )
        after = await engine.streams.client.stats()
        assert results[0] == alone
        cached = after.cached_tokens - before.cached_tokens
        assert cached == len(prompt) - 1, "only the generation reads the cache"
        # Four prompts of 140 tokens at 64 a step would be nine steps one after the other; generation adds its own five.
        assert after.steps - before.steps <= 3 * len(prompt) // 64 + 2 + 6
        assert after.blocks_used == 0

"""The sampler against transformers' own processors, and its randomness against published vectors and statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from streamkv.runner.philox import philox_4x32, uniform
from streamkv.runner.sampler import SamplerRows, kept_logits, sample, token_logprobs

# Known answers for philox4x32-10 from Random123's kat_vectors: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def rows(count: int, **values: Any) -> SamplerRows:
    defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "branch": 0, "position": 0}
    kinds = {"temperature": torch.float32, "top_p": torch.float32}
    made = {}
    for name, default in defaults.items():
        value = values.get(name, default)
        dtype = kinds.get(name, torch.int64)
        made[name] = torch.as_tensor(value, dtype=dtype).expand(count).clone()
    return SamplerRows(**made)


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(word) for word in philox_4x32((c0, c1, c2, c3), (k0, k1))) == result


def test_uniform_depends_on_every_part_of_its_key_and_on_nothing_else() -> None:
    def one(seed: int, branch: int, position: int) -> float:
        return float(uniform(torch.tensor([seed]), torch.tensor([branch]), torch.tensor([position])))

    base = one(5, 0, 9)
    assert base == one(5, 0, 9)
    assert len({base, one(6, 0, 9), one(5, 1, 9), one(5, 0, 10), one(5 + 2**40, 0, 9)}) == 5
    many = uniform(torch.full((4096,), 3), torch.zeros(4096, dtype=torch.long), torch.arange(4096))
    assert float(many.min()) > 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.02


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 200, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_kept_set_and_probabilities_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    vocab_size = 200
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    scores: Any = TemperatureLogitsWarper(temperature)(torch.zeros(3, 1), logits)  # type: ignore[arg-type]  # ids unused
    if top_k:
        scores = TopKLogitsWarper(min(top_k, vocab_size))(None, scores)  # type: ignore[arg-type]  # ids unused
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]  # ids unused
    ours = kept_logits(logits / temperature, torch.full((3,), top_k), torch.full((3,), top_p))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(scores))
    torch.testing.assert_close(torch.softmax(ours, -1), torch.softmax(scores, -1))


def test_rows_with_different_parameters_do_not_mix() -> None:
    logits = torch.randn(5, 500, generator=torch.Generator().manual_seed(1))
    top_k, top_p = torch.tensor([0, 5, 0, 20, 1]), torch.tensor([1.0, 1.0, 0.4, 0.8, 1.0])
    together = kept_logits(logits, top_k, top_p)
    for index in range(5):
        alone = kept_logits(logits[index : index + 1], top_k[index : index + 1], top_p[index : index + 1])
        assert torch.equal(together[index], alone[0])


def test_drawn_tokens_follow_the_distribution() -> None:
    draws, vocab_size = 20_000, 12
    logits = torch.linspace(-2, 2, vocab_size).expand(draws, vocab_size)
    tokens = sample(logits, rows(draws, seed=4, position=torch.arange(draws), top_k=8))
    counts = torch.bincount(tokens, minlength=vocab_size).double()
    expected = torch.softmax(kept_logits(logits[:1], torch.tensor([8]), torch.tensor([1.0])), -1)[0].double() * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi_square < 24.3, "7 degrees of freedom: this is the 99.9 % point"


def test_greedy_rows_beside_random_rows() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    mixed = sample(logits, rows(4, temperature=torch.tensor([0.0, 1.0, 0.0, 1.0]), seed=1, position=3))
    assert mixed[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert torch.equal(sample(logits, rows(4, temperature=0.0)), logits.argmax(-1))


def test_smallest_and_largest_uniform_stay_inside_the_kept_set() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2] = logits[0, 4] = 0.0
    draws = 3000
    tokens = sample(logits.expand(draws, 6), rows(draws, position=torch.arange(draws)))
    assert set(tokens.tolist()) == {2, 4}


def test_logprobs_are_those_of_the_model_not_of_the_cuts() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    tokens = torch.tensor([7, 0, 49])
    reported = token_logprobs(logits, tokens, [(0, 5), (2, 0)])
    reference = torch.log_softmax(logits, -1)
    assert set(reported) == {0, 2}
    assert reported[0].chosen == pytest.approx(float(reference[0, 7]))
    assert [token for token, _ in reported[0].top] == reference[0].topk(5).indices.tolist()
    assert reported[2].top == ()

"""The sampler against transformers' own processors, and its randomness against published vectors and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv.runner import sampling_draw
from streamkv.runner.philox import philox_4x32, uniform
from streamkv.runner.sampler import CHUNK, inverse_cdf, largest_chunks, most_probable, num_chunks
from tests.runner.sampling_oracle import (
    Row,
    distribution,
    positions,
    random_logits,
    rows_of,
    sample,
    sampling,
    tables,
    transformers_scores,
)

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


# ---------------------------------------------------------------- against transformers


def agrees(rows: list[Row], logits: torch.Tensor) -> None:
    """Kept set and probabilities of every row are transformers'; where it leaves no token, see the tests of empty rows."""
    kept, probabilities = distribution(rows, logits)
    for index, row in enumerate(rows):
        scores = transformers_scores(row, logits[index])
        if torch.isfinite(scores).any():
            assert torch.equal(kept[index], torch.isfinite(scores)), f"row {index}: {row}"
            torch.testing.assert_close(probabilities[index], torch.softmax(scores, -1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("vocab_size", [200, 1600, 6000])
@settings(max_examples=40)
@given(data=st.data())
def test_mixed_rows_equal_transformers(vocab_size: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=1, max_size=6))
    spread = data.draw(st.sampled_from([0.3, 2.0, 8.0]))
    agrees(rows, random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, spread))


CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 40},
    "top_k beyond the listed ones": {"top_k": 500},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.03},
    "typical_p": {"typical_p": 0.9},
    "typical_p, small": {"typical_p": 0.05},
    "all cuts": {"top_k": 200, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.9},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.5},
    "bias": {"logit_bias": ((3, 5.0), (1999, -100.0))},
    "allowed": {"allowed_token_ids": (1, 5, 1999)},
    "bad words": {"bad_words": ((9,), (7, 11), (5, 6, 7, 12), (1, 7, 13))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (0, 44, 1999)},
    "min_tokens, reached": {"min_tokens": 8, "stop_token_ids": (0, 44, 1999)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_each_parameter_equals_transformers(case: str, spread: float) -> None:
    row = Row(sampling(**CASES[case]), [3, 44, 3, 9, 1999, 0, 3, 5, 5, 6, 7], 3)
    agrees([row] * 4, random_logits(11, 4, 2000, spread))


def test_each_parameter_changes_something() -> None:
    """The cases above would prove nothing if they kept all tokens as they are."""
    logits = random_logits(11, 1, 2000, 2.0)
    tokens = [3, 44, 3, 9, 1999, 0, 3, 5, 5, 6, 7]
    _, plain = distribution([Row(sampling(), tokens, 3)], logits)
    changed = {
        case for case in CASES if not torch.equal(distribution([Row(sampling(**CASES[case]), tokens, 3)], logits)[1], plain)
    }
    assert changed == set(CASES) - {"min_tokens, reached"}


def test_bad_words_mask_only_what_they_complete() -> None:
    row = Row(sampling(bad_words=((9,), (7, 11), (5, 6, 7, 12), (1, 7, 13), (7,) * 30)), [5, 6, 7], 1)
    kept, _ = distribution([row], random_logits(0, 1, 40))
    assert (~kept[0]).nonzero().flatten().tolist() == [9, 11, 12]


def test_equal_logits_at_the_threshold_are_all_kept() -> None:
    logits = torch.zeros(3, 300)
    logits[:, 40:170] = 1.0
    logits[:, 299] = 2.0
    rows = [Row(sampling(**asked), [0], 1) for asked in ({"top_k": 5}, {"top_p": 0.05}, {"top_k": 5, "typical_p": 0.5})]
    kept, _ = distribution(rows, logits)
    assert kept[0].sum() == kept[1].sum() == 131
    assert torch.equal(kept[2], torch.isfinite(transformers_scores(rows[2], logits[2])))


# ---------------------------------------------------------------- tokens


def draws_from(rows: list[Row], logits: torch.Tensor) -> None:
    """Each token is the inverse CDF of its row's distribution at its uniform number, or the most probable one."""
    kept, probabilities = distribution(rows, logits)
    for index, (row, token) in enumerate(zip(rows, sample(rows, logits), strict=True)):
        if not kept[index].any():
            assert token == int(logits[index].argmax())
        elif row.sampling.temperature == 0:
            assert token == int(probabilities[index].argmax())
        else:
            assert kept[index, token]
            number = uniform(*(torch.tensor([n]) for n in (row.sampling.seed, row.branch, len(row.tokens))))
            cdf = probabilities[index].cumsum(-1)
            assert cdf[token] - probabilities[index, token] <= float(number) + 1e-6
            assert cdf[token] >= float(number) - 1e-6


@settings(max_examples=60)
@given(data=st.data())
def test_the_token_is_the_inverse_cdf_at_the_uniform_number(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([1, 3, 63, 64, 65, 700, 9000]))
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=1, max_size=6))
    spread = data.draw(st.sampled_from([0.3, 3.0]))
    draws_from(rows, random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, spread))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize(
    "asked", [{"min_p": 1e-5}, {"top_p": 0.999}, {"top_k": 6000}, {"typical_p": 0.9}, {"top_k": 900, "top_p": 0.99}]
)
def test_kept_sets_that_are_spread_over_many_chunks(temperature: float, asked: dict[str, Any]) -> None:
    rows = [Row(sampling(seed=seed, temperature=temperature, **asked), [0], 1) for seed in range(30)]
    draws_from(rows, random_logits(4, 30, 9000, 1.0))


@pytest.mark.parametrize("asked", [{"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.6}, {"temperature": 1.7}])
def test_drawn_tokens_follow_the_distribution(asked: dict[str, Any]) -> None:
    draws, vocab_size = 20_000, 12
    logits = torch.linspace(-2, 2, vocab_size)[None]
    row = Row(sampling(seed=4, **asked), [0], 1)
    made = tables([row] * 200, vocab_size)
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for first in range(0, draws, 200):
        tokens = made.sample(np.arange(200), np.arange(first, first + 200), logits.expand(200, -1))[0]
        counts += torch.bincount(tokens, minlength=vocab_size)
    kept, probabilities = distribution([row], logits)
    assert counts[~kept[0]].sum() == 0
    expected = probabilities[0][kept[0]] * draws
    chi_square = float(((counts[kept[0]] - expected) ** 2 / expected).sum())
    # 99.9 % points for 1 to 11 degrees of freedom.
    points = [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3]
    assert int(kept[0].sum()) >= 3
    assert chi_square < points[int(kept[0].sum()) - 2]


@settings(max_examples=40)
@given(data=st.data())
def test_tokens_are_the_same_alone_and_in_any_batch_and_row(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([3, 130, 5300, 7000]))
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=2, max_size=9))
    logits = random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, data.draw(st.sampled_from([0.5, 4.0])))
    together = sample(rows, logits)
    assert [sample([row], logits[index : index + 1])[0] for index, row in enumerate(rows)] == together
    order = data.draw(st.permutations(range(len(rows))))
    made = tables(rows, vocab_size, places=[place * 3 % 31 for place in range(len(rows))])
    places = np.array([index * 3 % 31 for index in order], np.int64)
    mixed, _ = made.sample(places, positions(rows)[list(order)], logits[list(order)])
    assert mixed.tolist() == [together[index] for index in order]


def test_tokens_are_the_same_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{}, {"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.9}, {}, {"typical_p": 0.5}, {"min_p": 0.1}]
    rows = [Row(sampling(seed=index, **asked[index % 7]), [0], 1) for index in range(50)]
    logits = random_logits(1, 50, 500)
    whole = sample(rows, logits)
    monkeypatch.setattr(sampling_draw, "_SLICE", 1200)  # two rows
    assert sample(rows, logits) == whole


def test_the_cdf_of_a_row_is_bitwise_the_same_in_any_batch() -> None:
    """Tokens alone would show a difference in the last bit once in millions of draws."""
    logits = random_logits(5, 33, 70 * CHUNK, 2.0).view(33, 70, CHUNK)
    weights = torch.softmax(logits.flatten(1), -1).view_as(logits)
    shifted = (logits - logits.amax(dim=(1, 2), keepdim=True)).exp_()
    for index in range(33):
        alone = logits[index : index + 1]
        assert torch.equal(torch.softmax(alone.flatten(1), -1).view_as(alone)[0], weights[index])
        assert torch.equal((alone - alone.amax(dim=(1, 2), keepdim=True)).exp_()[0], shifted[index])
        assert torch.equal(weights[index : index + 1].sum(dim=-1)[0], weights.sum(dim=-1)[index])
        numbers = torch.full((1,), 0.3, dtype=torch.float64)
        padded = torch.cat([torch.zeros(1, 3, CHUNK), weights[index : index + 1], torch.zeros(1, 9, CHUNK)], dim=1)
        assert inverse_cdf(padded, numbers) == inverse_cdf(weights[index : index + 1], numbers) + 3 * CHUNK


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("vocab_size", [1, 3, 64, 65, 200])
def test_extreme_values(vocab_size: int) -> None:
    logits = random_logits(3, 1, vocab_size)
    best = int(logits.argmax())
    for asked in (
        {"temperature": 1e-6},
        {"temperature": 1e-45},
        {"temperature": 1e-300},
        {"top_k": 1},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"temperature": 100.0, "top_p": 1e-9, "top_k": 10**9},
    ):
        assert sample([Row(sampling(seed=9, **asked), [0], 1)], logits) == [best], asked
    hot = [Row(sampling(seed=seed, temperature=100.0, top_k=vocab_size, typical_p=1 - 2**-53), [0], 1) for seed in range(300)]
    assert set(sample(hot, logits.expand(300, -1))) == set(range(min(vocab_size, 3))) or vocab_size > 3


def test_only_one_token_is_possible() -> None:
    logits = torch.full((1, 500), -torch.inf)
    logits[0, 321] = -7.0
    for asked in ({}, {"temperature": 0.0}, {"top_k": 9, "typical_p": 0.3}, {"top_p": 0.4}, {"min_p": 0.1}, {"typical_p": 0.9}):
        assert sample([Row(sampling(**asked), [0], 1)], logits) == [321], asked


def test_two_tokens_are_possible_and_both_come() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2] = logits[0, 4] = 0.0
    rows = [Row(sampling(seed=seed), [0], 1) for seed in range(100)]
    assert set(sample(rows, logits.expand(100, -1))) == {2, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_masks_leave_nothing_the_most_probable_token_comes(temperature: float) -> None:
    logits = random_logits(8, 2, 90)
    masked = sampling(temperature=temperature, allowed_token_ids=(4, 5), bad_words=((4,), (5,)), top_k=3)
    assert sample([Row(masked, [0], 1), Row(sampling(seed=1), [0], 1)], logits)[0] == int(logits[0].argmax())
    assert 0 <= sample([Row(masked, [0], 1)], torch.full((1, 90), -torch.inf))[0] < 90


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all nan", "all inf"])
@settings(max_examples=15)
@given(data=st.data())
def test_a_row_with_nan_or_inf_disturbs_nobody(bad: Any, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([3, 300, 7000]))
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=3, max_size=6))
    logits = random_logits(1, len(rows), vocab_size)
    healthy = sample(rows, logits)
    spoilt = logits.clone()
    spoilt[1, slice(None) if isinstance(bad, str) else vocab_size // 2] = float(bad[4:]) if isinstance(bad, str) else bad
    tokens = sample(rows, spoilt)
    assert [*tokens[:1], *tokens[2:]] == [*healthy[:1], *healthy[2:]]
    assert 0 <= tokens[1] < vocab_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_they_are(dtype: torch.dtype) -> None:
    logits = random_logits(2, 8, 700).to(dtype)
    rows = [Row(sampling(seed=seed, top_k=20, repetition_penalty=1.2), [1, 2], 1) for seed in range(8)]
    before = logits.clone()
    assert sample(rows, logits) == sample(rows, logits.float())
    assert torch.equal(logits, before)


def test_the_most_probable_token_has_the_lowest_id_among_equals() -> None:
    for vocab_size in (1, 64, 130, 2000):
        logits = torch.full((4, num_chunks(vocab_size) * CHUNK), -torch.inf)
        logits[:, :vocab_size] = random_logits(1, 4, vocab_size).bfloat16().clamp(max=1.0)  # many equal ones
        chunked = logits.view(4, -1, CHUNK)
        expected = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert most_probable(chunked, chunked.amax(-1)).tolist() == expected


def test_the_largest_logits_lie_in_the_chosen_chunks() -> None:
    logits = random_logits(1, 3, 300 * CHUNK).view(3, -1, CHUNK)
    numbers, candidates = largest_chunks(logits, logits.amax(-1), 64)
    assert (numbers.diff(dim=-1) > 0).all()
    assert torch.equal(candidates.flatten(1).topk(64).values, logits.flatten(1).topk(64).values)

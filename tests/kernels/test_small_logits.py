"""logits.cu: the most probable token, penalties and masks as the runner's tables compute them, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv.runner.sampling_logprobs import launch_logprobs
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.sampling import Changed, Changes, SamplingKernels
from tests.kernels.sampling_oracle import changes_of
from tests.kernels.small import NAN, in_every_schedule, same_bits
from tests.runner.sampling_oracle import Row, random_logits, rows_of, sampling
from tests.runner.sampling_oracle import changed as changed_by_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 64, 65, 1001, 5000)


# -- the most probable token ------------------------------------------------------------------------------------------------


def takes_the_first_of_the_largest(device: EmulatedDevice, dtype: torch.dtype) -> None:
    kernels = SamplingKernels(device, threads=64)
    for vocab_size in SIZES:
        memory = torch.full((5, vocab_size + 3), NAN, dtype=dtype)
        logits = memory[:, 1 : vocab_size + 1]  # rows begin anywhere, and are read no further
        logits.copy_(random_logits(vocab_size, 5, vocab_size).round())  # many equal ones
        logits[3] = -logits[3].abs() - 1  # the largest is below 0
        logits[4] = torch.tensor([0.0, -0.0]).repeat(vocab_size)[1 : vocab_size + 1]  # all equal, whatever their signs
        tokens, finite = kernels.most_probable(logits)
        assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]
        assert finite.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_the_largest_logits(plain: EmulatedDevice, dtype: torch.dtype) -> None:
    takes_the_first_of_the_largest(plain, dtype)


def finds_faults(device: EmulatedDevice, dtype: torch.dtype) -> None:
    kernels = SamplingKernels(device, threads=64)
    for fault in (NAN, -NAN, torch.inf, -torch.inf):
        for place in (0, 1, 64, 299, 300):
            logits = random_logits(place, 3, 301).to(dtype)
            expected = logits.argmax(-1)
            logits[1, place] = fault
            tokens, finite = kernels.most_probable(logits)
            assert finite.tolist() == [True, False, True]
            assert tokens[0] == expected[0]
            assert tokens[2] == expected[2]
            assert 0 <= tokens[1] < 301


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_fault_anywhere_is_found(plain: EmulatedDevice, dtype: torch.dtype) -> None:
    finds_faults(plain, dtype)


# -- penalties, bias, masks -------------------------------------------------------------------------------------------------


def by_runner(rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
    return changed_by_torch(rows, logits)[:, : logits.shape[1]]


def changes_like_the_runner(device: EmulatedDevice, rows: list[Row], logits: torch.Tensor) -> Changed:
    """Bit by bit, but for the sign of 0."""
    before = logits.clone()
    changed = SamplingKernels(device, threads=64).change(logits, changes_of(rows, logits.shape[1]))
    assert torch.equal(changed.logits, by_runner(rows, logits))
    assert same_bits(logits, before)
    assert changed.best.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert changed.finite.all()
    return changed


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_logits_change_as_the_runner_changes_them(plain: EmulatedDevice, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([1, 3, 31, 32, 33, 64, 700]))
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=1, max_size=5))
    logits = random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size).to(data.draw(st.sampled_from(DTYPES)))
    changed = changes_like_the_runner(plain, rows, logits)
    for device in in_every_schedule(plain)[1:]:
        assert same_bits(changes_like_the_runner(device, rows, logits).logits, changed.logits)


CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.5},
    "all penalties and a bias on what is penalised": {
        "repetition_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": 0.7, "logit_bias": ((3, 0.1), (44, -9.0)),
    },
    "bias": {"logit_bias": ((3, 5.0), (699, -100.0))},
    "allowed, with a bias": {"allowed_token_ids": (1, 5, 31, 32, 699), "logit_bias": ((0, 100.0), (31, 1.0))},
    "bad words, some allowed": {"bad_words": ((9,), (7, 11), (5, 6, 7, 12), (1, 7, 13)), "allowed_token_ids": (9, 11, 12, 13)},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (0, 44, 44, 699)},
}  # fmt: skip  # a case a line


def changes_each(device: EmulatedDevice, case: str, dtype: torch.dtype = torch.float32) -> None:
    row = Row(sampling(**CASES[case]), [3, 44, 3, 9, 699, 0, 3, 5, 5, 6, 7], 3)
    plain_row = Row(sampling(), [1], 1)
    logits = random_logits(11, 3, 700, 2.0).to(dtype)
    changed = changes_like_the_runner(device, [plain_row, row, plain_row], logits)
    assert not torch.equal(changed.logits[1], logits[1].float())
    assert torch.equal(changed.logits[::2], logits[::2].float())


@pytest.mark.parametrize("case", CASES)
def test_each_change(plain: EmulatedDevice, case: str) -> None:
    changes_each(plain, case)


def test_without_changes_it_is_a_copy(plain: EmulatedDevice) -> None:
    logits = random_logits(1, 2, 37).bfloat16()
    logits[1, 36] = torch.inf
    changed = SamplingKernels(plain, threads=64).change(logits, Changes())
    assert torch.equal(changed.logits, logits.float())
    assert changed.finite.tolist() == [True, False]


# -- log-probabilities --------------------------------------------------------------------------------------------------------


def tells_logprobs(device: EmulatedDevice, dtype: torch.dtype, spread: float) -> None:
    kernels = SamplingKernels(device, threads=96)
    for vocab_size in SIZES:
        logits = random_logits(vocab_size, 7, vocab_size, spread).to(dtype)
        tokens = torch.arange(7) * 977 % vocab_size
        tokens[:2] = torch.stack((logits[0].argmax(), logits[1].argmin()))
        exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        logprobs, ranks = kernels.token_logprobs(logits, tokens)
        # float32 has a unit of 2e-6 at 16, where the spread takes differences to.
        assert ((logprobs.double() - exact).abs() <= 2e-6 + 1e-6 * exact.abs() / 4).all()
        assert ranks.tolist() == [one.rank for one in launch_logprobs(logits, tokens, 0).read()]


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 3.0), (torch.bfloat16, 1.0), (torch.float16, 8.0)])
def test_log_probabilities(plain: EmulatedDevice, dtype: torch.dtype, spread: float) -> None:
    tells_logprobs(plain, dtype, spread)


def test_log_probabilities_of_faults(plain: EmulatedDevice) -> None:
    logits = random_logits(1, 5, 70)
    logits[0, 3], logits[1, 69], logits[2, 5], logits[3] = NAN, -NAN, torch.inf, -torch.inf
    logits[4, 9] = -torch.inf
    logprobs, ranks = SamplingKernels(plain, threads=32).token_logprobs(logits, torch.full((5,), 9))
    assert logprobs[:4].isnan().all()
    assert logprobs[4] == -torch.inf
    assert ranks[4] == 70


def logits_obey(device: EmulatedDevice) -> None:
    """One of each, for the checked build."""
    logits = random_logits(1, 2, 301).bfloat16()
    changes_each(device, "bad words, some allowed", torch.bfloat16)
    kernels = SamplingKernels(device, threads=64)
    kernels.most_probable(logits)
    kernels.token_logprobs(logits, torch.tensor([0, 300]))


def test_the_checked_build_finds_nothing(checked: EmulatedDevice) -> None:
    logits_obey(checked)


STARTS, IDS = torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda k, x: k.most_probable(x.double()), "logits is float64"),
        (lambda k, x: k.most_probable(x.T.contiguous().T), "the last dimension of logits must be dense"),
        (lambda k, x: k.most_probable(torch.zeros(1, 2**19 + 1)), "logits have 524289 tokens"),
        (lambda k, x: k.token_logprobs(x, torch.zeros(3, dtype=torch.int64)), r"tokens has the shape \[3\]"),
        (lambda k, x: k.change(x, Changes(seen=(STARTS, IDS, IDS))), "penalties must be given"),
        (lambda k, x: k.change(x, Changes(penalties=torch.zeros(2, 2))), r"penalties has the shape \[2, 2\]"),
        (lambda k, x: k.change(x, Changes(torch.zeros(2, 3), (STARTS[:2], IDS, IDS))), r"starts of seen has the shape \[2\]"),
        (lambda k, x: k.change(x, Changes(bias=(STARTS, IDS, IDS))), "numbers of bias is int32"),
        (lambda k, x: k.change(x, Changes(bias=(STARTS, IDS, torch.zeros(3)))), r"numbers of bias has the shape \[3\]"),
        (lambda k, x: k.change(x, Changes(banned=(STARTS, IDS.long()))), "ids of banned is int64"),
        (lambda k, x: k.change(x, Changes(allowed=torch.zeros(2, 1, dtype=torch.int32))), "allowed has 1 words a row"),
        (lambda k, x: k.change(x, Changes(allowed=torch.zeros(2, 2))), "allowed is float32"),
    ],
)
def test_what_does_not_fit_is_named(
    plain: EmulatedDevice, call: Callable[[SamplingKernels, torch.Tensor], object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        call(SamplingKernels(plain), torch.zeros(2, 40))

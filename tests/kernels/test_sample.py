"""sample.cu: tokens are those of the definition in exact integers, always; and those of the runner's sampler.

Where exponentials and sums of floats decide, the latter may differ by one token; how seldom is told by a distance: the uniform
number then lies within 2e-6 of the step between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamkv.runner.philox import uniform
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.sampling import Parameters, SamplingKernels
from tests.kernels.sampling_oracle import exact_token, parameters_of, sample_by_kernels, weights_of
from tests.kernels.small import NAN, in_every_schedule
from tests.runner.sampling_oracle import CLOSE, Row, distribution, on_a_step, positions, random_logits, rows_of, sample, sampling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 63, 65, 700, 1999)


def without_typical(row: Row) -> Row:
    """The kernels leave typical-p to torch."""
    return replace(row, sampling=msgspec.structs.replace(row.sampling, typical_p=1.0))


def draw_rows(data: st.DataObject, vocab_size: int, *, masks: bool = True, most: int = 5) -> list[Row]:
    rows = data.draw(st.lists(rows_of(vocab_size, masks=masks), min_size=1, max_size=most))
    return [without_typical(row) for row in rows]


def draws(device: EmulatedDevice, rows: Sequence[Row], logits: torch.Tensor, *, threads: int = 128) -> list[int]:
    kernels = SamplingKernels(device, threads=threads)
    return kernels.sample(logits, parameters_of(rows, logits.shape[1]), torch.from_numpy(positions(rows))).tolist()


# -- against the definition ------------------------------------------------------------------------------------------------


def weighs_as_exp(device: EmulatedDevice) -> None:
    below = torch.cat([torch.linspace(-32, 0, 20_001), torch.tensor([-0.0, -1e-30, -1e-7, -31.0, -1e30, -torch.inf, NAN])])
    weights, exact = weights_of(device, below), below.double().nan_to_num(-torch.inf).exp() * 2**44
    assert ((weights - exact).abs() <= exact * 2e-7 + 1).all()
    assert weights[20_000] == weights[20_001] == 2**44
    assert weights[-1] == weights[-2] == 0


def test_weights_are_exponentials(plain: EmulatedDevice) -> None:
    weighs_as_exp(plain)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_the_definition(plain: EmulatedDevice, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from(SIZES))
    rows = draw_rows(data, vocab_size, masks=False)
    logits = random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, data.draw(st.sampled_from([0.3, 3.0, 30.0])))
    if data.draw(st.booleans()):
        logits = logits.round() / 2  # many equal ones
    dtype = data.draw(st.sampled_from(DTYPES))
    logits = logits.to(dtype)
    wanted = [exact_token(plain, row, logits[index].float()) for index, row in enumerate(rows)]
    assert draws(plain, rows, logits) == wanted


CUTS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 40},
    "top_k, all but one": {"top_k": 2999},
    "top_p": {"top_p": 0.9},
    "top_p, nearly all": {"top_p": 0.999999},
    "min_p": {"min_p": 0.03},
    "all": {"top_k": 200, "top_p": 0.95, "min_p": 0.001, "temperature": 1.3},
    "hot": {"temperature": 100.0, "top_p": 0.5},
    "cold": {"temperature": 1e-3},
    "coldest": {"temperature": 1e-300, "top_k": 3},
    "greedy": {"temperature": 0.0, "top_k": 3},
}


def follows_the_definition(device: EmulatedDevice, case: str, count: int = 6, vocab_size: int = 3000) -> None:
    """Rows beyond 2^32 in every part of the key."""
    rows = [Row(sampling(seed=(index << 40) + index, **CUTS[case]), [0] * (1 + index), 1, index % 3) for index in range(count)]
    logits = random_logits(7, count, vocab_size, 2.0)
    assert draws(device, rows, logits) == [exact_token(device, row, logits[index]) for index, row in enumerate(rows)]


@pytest.mark.parametrize("case", CUTS)
def test_each_cut_is_that_of_the_definition(plain: EmulatedDevice, case: str) -> None:
    follows_the_definition(plain, case)


def test_each_cut_changes_something(plain: EmulatedDevice) -> None:
    """The cases above would prove nothing if they drew as if there were no cut."""
    logits = random_logits(7, 60, 3000, 2.0)
    tokens = {case: draws(plain, [Row(sampling(seed=seed, **CUTS[case]), [0], 1) for seed in range(60)], logits) for case in CUTS}
    assert {case for case in CUTS if tokens[case] == tokens["none"]} <= {"none", "top_k, all but one", "top_p, nearly all"}
    assert tokens["cold"] == tokens["coldest"] == tokens["greedy"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_first_kept_token_shows_the_cut(plain: EmulatedDevice, data: st.DataObject) -> None:
    """Logits ascend with their ids, and a small uniform number picks the first that is kept: the cut itself, ties and all."""
    steps = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.25, 0.5]), min_size=1, max_size=150))
    logits = torch.tensor([steps]).cumsum(-1).clamp(max=6.0) - 1.0
    size = logits.shape[1]
    asked = {
        "top_k": data.draw(st.integers(0, size + 1)),
        "top_p": data.draw(st.just(1.0) | st.floats(0.01, 0.999)),
        "min_p": data.draw(st.just(0.0) | st.floats(1e-3, 1.0)),
    }
    row = Row(sampling(seed=SMALL, **asked), [0], 1)
    kept, probabilities = distribution([row], logits)
    first = int(kept[0].nonzero()[0])
    assume(float(probabilities[0, first]) > 2e-4)
    # Where a sum is p almost exactly, floats decide.
    nearly = [distribution([Row(sampling(seed=SMALL, **asked | {"top_p": min(1.0, asked["top_p"] * f)}), [0], 1)], logits)[0]
              for f in (1 - CLOSE, 1 + CLOSE)]  # fmt: skip
    assume(torch.equal(*nearly) or asked["top_p"] == 1)
    assert draws(plain, [row], logits) == [first]


def cuts_show(device: EmulatedDevice) -> None:
    """The same for some cuts, each with its neighbours."""
    logits = torch.arange(150)[None] * 0.02
    for asked in (
        *({"top_k": k} for k in (1, 7, 8, 149)),
        *({"top_p": p} for p in (0.1, 0.5, 0.9, 0.999)),
        *({"min_p": p} for p in (0.1, 0.5, 1.0)),
        {"top_k": 50, "top_p": 0.5},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.7},
    ):
        row = Row(sampling(seed=SMALL, **asked), [0], 1)
        assert draws(device, [row], logits) == [exact_token(device, row, logits[0])], asked


def test_cuts_show(plain: EmulatedDevice) -> None:
    cuts_show(plain)


def _small_seed() -> int:
    seeds = torch.arange(40_000)
    return int(uniform(seeds, torch.zeros_like(seeds), torch.ones_like(seeds)).argmin())


SMALL = _small_seed()
"""Its uniform number at position 1 is below 1e-4."""


def counts_by_the_generator(device: EmulatedDevice, positions_at: Sequence[int]) -> None:
    """Among 2^12 equal logits the token is the first 12 bits of Philox's first word."""
    count, size = len(positions_at), 2**12
    seed = torch.arange(count) * (2**61 // count) + 3
    branch, position = torch.arange(count) % 5, torch.tensor(positions_at)
    rows = torch.ones(count, dtype=torch.float64)
    given_ = Parameters(rows.float(), torch.zeros(count, dtype=torch.int64), rows, rows.mul(-torch.inf), seed, branch)
    tokens = SamplingKernels(device, threads=64).sample(torch.zeros(count, size), given_, position)
    assert tokens.tolist() == (uniform(seed, branch, position) * size).long().tolist()


def test_the_uniform_number_is_the_runners(plain: EmulatedDevice) -> None:
    counts_by_the_generator(plain, [0, 1, 2, 77, 2**20, 2**32 - 1, 2**32, 2**40 + 5])


# -- against the runner ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_the_runner(plain: EmulatedDevice, data: st.DataObject) -> None:
    """With penalties, bias and masks, and where these leave nothing."""
    vocab_size = data.draw(st.sampled_from(SIZES))
    rows = draw_rows(data, vocab_size)
    logits = random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, data.draw(st.sampled_from([0.3, 3.0])))
    ours, by_runner = sample_by_kernels(plain, rows, logits), sample(rows, logits)
    if ours != by_runner:
        for index, (token, other) in enumerate(zip(ours, by_runner, strict=True)):
            assert token == other or on_a_step(rows[index], logits[index], token, other)


def test_a_large_vocabulary(plain: EmulatedDevice) -> None:
    """As large as there are, with blocks as large as on a GPU."""
    asked = [{}, {"top_k": 50}, {"top_p": 0.95}, {"temperature": 0.0}, {"top_k": 5000, "top_p": 0.9}]
    rows = [Row(sampling(seed=seed, **each), [0], 1) for seed, each in enumerate(asked)]
    logits = random_logits(3, len(rows), 151_937, 2.5)
    tokens = draws(plain, rows, logits, threads=1024)
    for index, (token, other) in enumerate(zip(tokens, sample(rows, logits), strict=True)):
        assert token == other or on_a_step(rows[index], logits[index], token, other)


# -- whatever the geometry --------------------------------------------------------------------------------------------------


def mixed(vocab_size: int) -> list[Row]:
    asked = [{}, {"top_k": 9}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.05}, {"top_k": 60, "top_p": 0.9}]
    return [Row(sampling(seed=seed + 5, **each), [0], 1) for seed, each in enumerate(asked)]


def is_the_same_everywhere(device: EmulatedDevice, dtype: torch.dtype) -> None:
    """Blocks of any size, threads in any order, rows that begin anywhere, alone and in a batch: the same tokens."""
    for vocab_size in (1, 129, 1001):
        rows, logits = mixed(vocab_size), random_logits(5, 6, vocab_size, 2.0).to(dtype)
        wanted = draws(device, rows, logits, threads=64)
        memory = torch.full((6, vocab_size + 3), NAN, dtype=dtype)
        for offset in (1, 2, 3):
            shifted = memory[:, offset : offset + vocab_size]
            shifted.copy_(logits)
            assert draws(device, rows, shifted, threads=32) == wanted
        assert [draws(device, [row], logits[index : index + 1])[0] for index, row in enumerate(rows)] == wanted
        for one in in_every_schedule(device):
            assert draws(one, rows, logits, threads=96) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_the_same_whatever_the_geometry(plain: EmulatedDevice, dtype: torch.dtype) -> None:
    is_the_same_everywhere(plain, dtype)


# -- extremes -----------------------------------------------------------------------------------------------------------------


def survives_faults(device: EmulatedDevice) -> None:
    for fault in (NAN, -NAN, torch.inf, "all nan", "all -inf", "one number"):
        rows, logits = mixed(300), random_logits(1, 6, 300)
        healthy = draws(device, rows, logits)
        if fault == "one number":
            logits[2] = -torch.inf
            logits[2, 123] = -7.0
        elif isinstance(fault, str):
            logits[2] = float(fault[4:])
        else:
            logits[2, 150] = fault
        tokens = draws(device, rows, logits)
        assert [*tokens[:2], *tokens[3:]] == [*healthy[:2], *healthy[3:]]
        assert 0 <= tokens[2] < 300
        assert fault != "one number" or tokens[2] == 123


def test_a_row_with_nan_or_inf_disturbs_nobody(plain: EmulatedDevice) -> None:
    survives_faults(plain)


def test_rows_without_a_token_take_the_fallback(plain: EmulatedDevice) -> None:
    rows, logits = mixed(90), torch.full((6, 90), -torch.inf)
    kernels, where = SamplingKernels(plain, threads=64), torch.from_numpy(positions(rows))
    fallback = torch.tensor([5, 0, 89, 44, 7, 1])
    assert kernels.sample(logits, parameters_of(rows, 90), where, fallback).tolist() == fallback.tolist()
    assert kernels.sample(logits, parameters_of(rows, 90), where).tolist() == [0] * 6


def sampling_obeys(device: EmulatedDevice) -> None:
    follows_the_definition(device, "all", count=2, vocab_size=301)
    survives_faults(device)


def test_the_checked_build_finds_nothing(checked: EmulatedDevice) -> None:
    sampling_obeys(checked)


def _with(**changes: Any) -> Callable[[SamplingKernels], object]:
    rows = mixed(40)
    given_ = replace(parameters_of(rows, 40), **{k: v for k, v in changes.items() if k not in ("logits", "position", "fallback")})
    logits, position = changes.get("logits", torch.zeros(6, 40)), changes.get("position", torch.zeros(6, dtype=torch.int64))
    return lambda kernels: kernels.sample(logits, given_, position, changes.get("fallback"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (_with(logits=torch.zeros(6, 40, dtype=torch.float64)), "logits is float64"),
        (_with(logits=torch.zeros(40, 6).T), "the last dimension of logits must be dense"),
        (_with(logits=torch.zeros(6, 0)), "logits have 0 tokens"),
        (_with(logits=torch.zeros(5, 40)), r"temperature has the shape \[6\]"),
        (_with(temperature=torch.ones(6, dtype=torch.float64)), "temperature is float64"),
        (_with(top_k=torch.ones(6, dtype=torch.int32)), "top_k is int32"),
        (_with(top_p=torch.ones(6)), "top_p is float32"),
        (_with(log_min_p=torch.ones(6)), "log_min_p is float32"),
        (_with(seed=torch.ones(12, dtype=torch.int64)[::2]), "seed must be contiguous"),
        (_with(position=torch.zeros(7, dtype=torch.int64)), r"position has the shape \[7\]"),
        (_with(fallback=torch.zeros(1, dtype=torch.int64)), r"fallback has the shape \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(plain: EmulatedDevice, call: Callable[[SamplingKernels], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(SamplingKernels(plain))


def test_no_rows_give_no_tokens(plain: EmulatedDevice) -> None:
    assert draws(plain, [], torch.zeros(0, 40)) == []

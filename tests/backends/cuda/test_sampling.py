"""The runner samples by the backend's kernels what it samples by torch: the same tokens, whatever rows are mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkv import LLM, SamplingParams
from streamkv.runner.sampling_tables import RowSampler
from streamkv.runner.transfer import upload
from streamkv_backends.cuda.ops import CudaOps
from streamkv_backends.cuda.sampling import CudaSampling
from streamkv_kernels.emulated import EmulatedDevice
from tests.runner.no_sync import NoSync, decide_as_on_a_gpu
from tests.runner.sampling_oracle import Row, on_a_step, positions, random_logits, rows_of, sampling, tables
from tests.runner.test_no_sync import ASKED, REMEMBERS
from tests.runner.test_sampling_tables import Counting, with_processor

NAN = float("nan")


@pytest.fixture(scope="module")
def ops(libraries: Path) -> CudaOps:
    """Blocks are small, so that the emulator is quick."""
    return CudaOps(EmulatedDevice(cache=libraries), torch.bfloat16, threads=64)


def same_tokens(ops: CudaOps, rows: list[Row], steps: list[torch.Tensor]) -> list[list[int]]:
    """Sample step by step in both ways; each token becomes part of its row."""
    vocab_size, batch = steps[0].shape[1], np.arange(len(rows))
    by_torch = tables(rows, vocab_size, processors={"counting": Counting()})
    by_kernels = tables(rows, vocab_size, processors={"counting": Counting()}, ops=ops)
    told = []
    for logits in steps:
        before = logits.clone()
        tokens, finite = by_kernels.sample(batch, positions(rows), logits)
        wanted, also_finite = by_torch.sample(batch, positions(rows), logits)
        assert logits.equal(before) or logits.isnan().any()
        assert finite.tolist() == also_finite.tolist() == torch.isfinite(logits).all(-1).tolist()
        assert tokens.dtype is torch.int64
        assert all(0 <= token < vocab_size for token in tokens.tolist())
        for index, (token, other) in enumerate(zip(tokens.tolist(), wanted.tolist(), strict=True)):
            plain = not rows[index].sampling.processors
            assert token == other or not finite[index] or (plain and on_a_step(rows[index], logits[index].float(), token, other))
        by_torch.append(batch, wanted.tolist())
        by_kernels.append(batch, wanted.tolist())
        for row, token in zip(rows, wanted.tolist(), strict=True):
            row.tokens.append(token)
        told.append(wanted.tolist())
    return told


@st.composite
def steps_of(draw: st.DrawFn) -> tuple[list[Row], list[torch.Tensor]]:
    """Rows of all kinds, and logits for some steps: with ties, with few that are not -inf, with NaN and infinity."""
    vocab_size = draw(st.sampled_from([3, 40, 90, 301]))
    rows = [
        with_processor(row, asked and vocab_size > 7)
        for row, asked in draw(
            st.lists(st.tuples(rows_of(vocab_size), st.sampled_from([False] * 4 + [True])), min_size=1, max_size=6)
        )
    ]
    dtype, spread = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), draw(st.sampled_from([0.3, 3.0]))
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        logits = random_logits(draw(st.integers(0, 2**31)), len(rows), vocab_size, spread)
        if draw(st.booleans()):
            logits = logits.round()
        for value in draw(st.lists(st.sampled_from([NAN, torch.inf, -torch.inf, "all"]), max_size=2)):
            row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, vocab_size - 1))
            logits[row, slice(None) if value == "all" else column] = -torch.inf if value == "all" else value
        steps.append(logits.to(dtype))
    return rows, steps


@settings(max_examples=80, deadline=None)
@given(made=steps_of())
def test_any_batch_is_sampled_as_torch_samples_it(ops: CudaOps, made: tuple[list[Row], list[torch.Tensor]]) -> None:
    same_tokens(ops, *made)


def test_each_parameter_alone_and_all_together(ops: CudaOps) -> None:
    """Over so many rows that each changes something."""
    logits = random_logits(3, 40, 90).round(decimals=1)
    plain = same_tokens(ops, [Row(sampling(seed=seed), [1, 2, 4], 1) for seed in range(40)], [logits])
    for case, asked in ASKED.items():
        rows = [Row(sampling(seed=seed, **asked), [1, 2, 4], 1) for seed in range(40)]
        assert (same_tokens(ops, rows, [logits]) == plain) == case.endswith("logprobs"), case
    mixed = [Row(sampling(seed=seed, **asked), [1, 2, 4], 1) for seed, asked in enumerate([*ASKED.values()] * 2)]
    same_tokens(ops, mixed, [random_logits(seed, len(mixed), 90) for seed in range(4)])


@pytest.mark.parametrize("typical_p", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_masks_leave_nothing_the_most_probable_token_comes(ops: CudaOps, temperature: float, typical_p: float) -> None:
    logits = random_logits(8, 2, 90)
    masked = sampling(temperature=temperature, allowed_token_ids=(4, 5), bad_words=((4,), (5,)), top_k=3, typical_p=typical_p)
    rows = [Row(masked, [0], 1), Row(sampling(seed=1), [0], 1)]
    assert same_tokens(ops, rows, [logits])[0][0] == int(logits[0].argmax())


def test_endings_may_come_once_min_tokens_are_there(ops: CudaOps) -> None:
    logits = torch.zeros(2, 40)
    logits[:, 7] = 9.0
    logits[:, 3] = 5.0
    rows = [Row(sampling(temperature=0.0, **asked), [1, 2], 2) for asked in ({"min_tokens": 2, "stop_token_ids": (7,)}, {})]
    assert same_tokens(ops, rows, [logits] * 4) == [[3, 7], [3, 7], [7, 7], [7, 7]]
    rows = [Row(sampling(temperature=0.0, min_tokens=least, stop_token_ids=(7,)), [1, 2], 2) for least in (1, 3)]
    assert same_tokens(ops, rows, [logits] * 4) == [[3, 3], [7, 3], [7, 3], [7, 7]]
    rows[0] = Row(sampling(temperature=0.0, min_tokens=2, stop_token_ids=(7,), bad_words=((3,),)), [1, 2], 2)
    assert [tokens[0] for tokens in same_tokens(ops, rows, [logits] * 4)] == [0, 0, 7, 7]


def test_logits_of_any_layout_and_dtype(ops: CudaOps) -> None:
    rows = [Row(sampling(seed=seed, top_k=9), [1], 1) for seed in range(3)]
    logits = random_logits(1, 90, 3).T
    tokens = same_tokens(ops, rows, [logits])
    rows = [Row(row.sampling, [1], 1) for row in rows]
    assert same_tokens(ops, rows, [logits.double()]) == tokens


PLAIN = [{"top_k": 3}, {"bad_words": ((4,),), "logit_bias": ((3, 1.0),)}, {"allowed_token_ids": (3, 4)}, {"typical_p": 0.5}]


@pytest.mark.parametrize(
    ("asked", "arrays"),
    [
        (PLAIN, 1),
        ([{"top_k": 3}, {"temperature": 0.0}], 1),
        ([*PLAIN, {"frequency_penalty": 0.5}], 4),
        ([*PLAIN, {"min_tokens": 99, "stop_token_ids": (5,)}], 3),
        ([{"min_tokens": 99, "stop_token_ids": (5,), "presence_penalty": 0.5}], 6),
    ],
)
def test_the_parameters_of_a_batch_go_up_once(
    ops: CudaOps, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]], arrays: int
) -> None:
    """Afterwards only positions do, and what they and the history change, in one copy."""
    sent: list[int] = []

    def counted(arrays: Any, device: torch.device) -> list[torch.Tensor]:
        sent.append(len(arrays))
        return upload(arrays, device)

    for module in ("sampling_tables", "sampling_fused"):
        monkeypatch.setattr(f"streamkv.runner.{module}.upload", counted)
    rows = [Row(sampling(**each), [1], 1) for each in asked]
    made, batch = tables(rows, 90, ops=ops), np.arange(len(rows))
    for step in range(4):
        made.sample(batch, positions(rows) + step, random_logits(step, len(rows), 90))
        assert step == 0 or sent == [arrays]
        sent.clear()


def test_a_row_is_free_of_what_the_request_before_it_asked_for(ops: CudaOps) -> None:
    made, logits = tables([Row(sampling(repetition_penalty=2.0, seed=9), [1, 2, 3], 3)] * 2, 90, ops=ops), torch.zeros(2, 90)
    made.sample(np.arange(2), np.array([3, 3]), logits)
    logits[:, 3] = 5.0
    logits[:, 4] = 4.0
    greedy = Row(sampling(temperature=0.0), [1, 2, 3], 3)
    made.admit(0, greedy.params)
    made.admit(1, Row(sampling(temperature=0.0, repetition_penalty=2.0), [1, 2, 3], 3).params)
    tokens, _ = made.sample(np.arange(2), np.array([3, 3]), logits)
    assert tokens.tolist() == [3, 4]


# -- log-probabilities -----------------------------------------------------------------------------------------------------------


def test_logprobs_of_rows_with_and_without_a_list(ops: CudaOps) -> None:
    rows = [Row(sampling(logprobs=count), [1], 1) for count in (0, 5, None, 0, 20)]
    logits, batch, tokens = random_logits(1, 5, 90), np.arange(5), torch.tensor([7, 3, 1, 89, 0])
    asked = []
    kernel = ops.sampling.token_logprobs

    class Listening:
        def __getattr__(self, name: str) -> Any:
            return getattr(ops.sampling, name)

        def token_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(tokens.tolist())
            return kernel(logits, tokens)

    made = tables(rows, 90, ops=ops)
    made._sampling = Listening()
    told = made.launch_logprobs(batch, logits, tokens).read(skip={4})
    wanted = tables(rows, 90).launch_logprobs(batch, logits, tokens).read(skip={4})
    assert asked == [[7, 89]]
    assert set(told) == set(wanted) == {0, 1, 3}
    for entry, one in told.items():
        assert one.chosen == pytest.approx(wanted[entry].chosen, abs=2e-6)
        assert (one.rank, one.top) == (wanted[entry].rank, wanted[entry].top)


# -- waiting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*ASKED, "all"])
def test_a_launch_waits_for_nothing(ops: CudaOps, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decide_as_on_a_gpu(monkeypatch)
    each = [*ASKED.values()] if case == "all" else [ASKED[case]] * 2
    rows = [Row(sampling(seed=seed, **asked), [1, 2, 4], 2) for seed, asked in enumerate(each)]
    made, logits, batch = tables(rows, 90, ops=ops), random_logits(5, len(rows), 90), np.arange(len(rows))
    with NoSync(logits):
        for step in range(2):
            tokens, finite = made.sample(batch, positions(rows) + step, logits)
            told = made.launch_logprobs(batch, logits, tokens)
    assert finite.all()
    assert len(told.read()) == sum("logprobs" in asked for asked in each)
    assert made.needs_history(batch) == (case in (*REMEMBERS, "all"))


# -- served -----------------------------------------------------------------------------------------------------------------


def test_an_engine_samples_by_kernels_what_it_samples_by_torch(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request after the other, so that all have the same logits in both ways."""
    monkeypatch.setenv("STREAMKV_CACHE", str(libraries))
    sampled: list[int] = []
    by_kernels = CudaSampling.sample

    def counted(self: CudaSampling, logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sampled.append(len(logits))
        return by_kernels(self, logits, *arguments)

    monkeypatch.setattr(CudaSampling, "sample", counted)
    asked: list[dict[str, Any]] = [
        {"top_p": 0.95, "temperature": 1.3},
        {"top_k": 20, "repetition_penalty": 1.2},
        {"typical_p": 0.9},
        {"logit_bias": {65: 4.0}, "min_p": 0.01, "logprobs": 0},
    ]

    def written() -> list[list[int]]:
        sampled.clear()
        with LLM(backend="cuda", device="emulated", dtype="float16", num_blocks=32, max_model_len=256, max_num_seqs=2) as llm:
            each = [SamplingParams(max_tokens=12, seed=seed, **one) for seed, one in enumerate(asked)]
            return [llm.generate(["Once upon a time"], one, use_tqdm=False)[0].outputs[0].token_ids for one in each]

    ours = written()
    assert len(sampled) > 20
    begin = RowSampler.__init__

    def without_kernels(self: RowSampler, **arguments: Any) -> None:
        begin(self, **arguments)
        self._sampling = None

    monkeypatch.setattr(RowSampler, "__init__", without_kernels)
    assert written() == ours
    assert not sampled
    assert len({tuple(tokens) for tokens in ours}) == len(asked)

"""The sampler's tables over many steps: history, composition of batches, log-probabilities, logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from streamkv.runner.params import RowParams
from streamkv.runner.sampling_logprobs import launch_logprobs
from streamkv.runner.sampling_tables import RowSampler
from tests.runner.sampling_oracle import Row, positions, random_logits, rows_of, sample, sampling, tables

VOCAB, NUM_ROWS, MAX_LEN = 90, 6, 60


class Counting:
    """A logits processor with state: what a row has said comes again less and less, and its own argument never."""

    def __init__(self) -> None:
        self.said: dict[int, list[int]] = {}
        self.never: dict[int, int] = {}

    def check(self, arguments: Any) -> None: ...

    def admit(self, row: int, arguments: Any, tokens: Sequence[int], num_prompt: int) -> None:
        self.said[row], self.never[row] = list(tokens), arguments

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.said[row].append(token)

    def apply(self, rows: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
        for index, row in enumerate(rows.tolist()):
            logits[index, self.said[row]] -= 1.0
            logits[index, self.never[row]] = -torch.inf
        return logits


def with_processor(row: Row, asked: bool) -> Row:
    values = {name: getattr(row.sampling, name) for name in row.sampling.__struct_fields__}
    if asked:
        values["processors"] = (("counting", 7),)
    return Row(sampling(**values), row.tokens, row.num_prompt, row.branch)


class Rows(RuleBasedStateMachine):
    """Requests come, are sampled in batches of any composition, are preempted, and come back in another row.

    Each step's tokens are those of a sampler that knows nothing but each row's whole history.
    """

    @initialize()
    def start(self) -> None:
        self.processor = Counting()
        self.sampler = RowSampler(
            num_rows=NUM_ROWS,
            max_len=MAX_LEN,
            vocab_size=VOCAB,
            device=torch.device("cpu"),
            processors={"counting": self.processor},
        )
        self.running: dict[int, Row] = {}
        self.preempted: list[Row] = []
        self.steps = 0

    def admit(self, place: int, row: Row) -> None:
        self.running[place] = row
        self.sampler.admit(place, RowParams(row.sampling, row.branch, list(row.tokens), row.num_prompt))

    @rule(place=st.integers(0, NUM_ROWS - 1), row=rows_of(VOCAB), asked=st.booleans())
    def new(self, place: int, row: Row, asked: bool) -> None:
        self.admit(place, with_processor(row, asked))

    @rule(place=st.integers(0, NUM_ROWS - 1))
    def preempt(self, place: int) -> None:
        if place in self.running:
            self.preempted.append(self.running.pop(place))

    @rule(place=st.integers(0, NUM_ROWS - 1))
    def come_back(self, place: int) -> None:
        if self.preempted:
            self.admit(place, self.preempted.pop())

    @rule(places=st.permutations(range(NUM_ROWS)), size=st.integers(1, NUM_ROWS), times=st.integers(1, 4), commit=st.booleans())
    def step(self, places: list[int], size: int, times: int, commit: bool) -> None:
        """A step that fails is sampled and not appended."""
        batch = [place for place in places if place in self.running and len(self.running[place].tokens) < MAX_LEN][:size]
        rows = np.array(batch, np.int64)
        for _ in range(times if batch else 0):
            own = [self.running[place] for place in batch]
            if any(len(row.tokens) >= MAX_LEN for row in own):
                return
            self.steps += 1
            logits = random_logits(self.steps, len(own), VOCAB)
            logits[:, :4] += 6.0  # what bad words are made of
            tokens = self.sampler.sample(rows, positions(own), logits)[0].tolist()
            for index, row in enumerate(own):
                assert tokens[index] == sample([row], logits[index : index + 1], processors={"counting": Counting()})[0]
            if commit:
                self.sampler.append(rows, tokens)
                for row, token in zip(own, tokens, strict=True):
                    row.tokens.append(token)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=40, stateful_step_count=25)


def test_bad_words_never_come_and_their_parts_do() -> None:
    """Words that the output itself begins; a small vocabulary, so that each would come again and again."""
    words = ((0, 1), (2, 2, 3), (3, 0, 2, 1))
    row = Row(sampling(bad_words=words, seed=3), [3, 0, 2], 3)
    made = tables([row, row], 4)
    said = [*row.tokens]
    for position in range(3, 300):
        tokens = made.sample(np.arange(2), np.full(2, position), torch.zeros(2, 4))[0].tolist()
        assert tokens[0] == tokens[1]
        made.append(np.arange(2), tokens)
        said.append(tokens[0])
    pieces = {word: {tuple(said[start : start + len(word)]) for start in range(len(said))} for word in words}
    assert not any(word in found for word, found in pieces.items())
    assert all(any(piece[:-1] == word[:-1] for piece in found) for word, found in pieces.items())


def test_a_row_may_be_sampled_once_more_after_its_end() -> None:
    row = Row(sampling(repetition_penalty=1.5, bad_words=((1, 2),)), [1, 2, 3], 2)
    made = RowSampler(num_rows=1, max_len=4, vocab_size=5, device=torch.device("cpu"))
    made.admit(0, row.params)
    for position in range(3, 8):
        token = made.sample(np.array([0]), np.array([position]), random_logits(position, 1, 5))[0].tolist()
        made.append(np.array([0]), token)


def test_tokens_that_the_model_does_not_have_are_left_out() -> None:
    asked = sampling(
        temperature=0.0,
        logit_bias=((10, 90.0), (3, 1.0)),
        bad_words=((10,), (1, 10)),
        stop_token_ids=(4, 10),
        min_tokens=2,
        allowed_token_ids=(3, 4, 10),
    )
    plain = Row(sampling(temperature=0.0), [1], 1)
    logits = random_logits(1, 3, 10)
    rows = [plain, Row(asked, [1], 1), plain]
    assert sample(rows, logits) == [int(logits[0].argmax()), 3, int(logits[2].argmax())]


def test_features_that_nobody_uses_allocate_nothing() -> None:
    made = tables([Row(sampling(), [1, 2], 1)] * 3, 1000)
    made.append(np.arange(3), [1, 2, 3])
    assert made._penalties._tokens.size == made._masks._tokens.size == 0
    batch = made._batch_of(np.arange(3))
    assert (batch.way.penalties, batch.way.masks, batch.processors, batch.way.drawing.temperature) == (None, None, [], None)


def test_a_batch_is_worked_out_once() -> None:
    made = tables([Row(sampling(top_k=3), [1], 1)] * 3, 100)
    rows = np.arange(3)
    first = made._batch_of(rows)
    made.sample(rows, np.full(3, 1), random_logits(0, 3, 100))
    made.append(rows, [1, 2, 3])
    assert made._batch_of(np.arange(3)) is first
    assert made._batch_of(np.arange(2)) is not first
    made.admit(2, Row(sampling(), [1], 1).params)
    assert made._batch_of(rows).way.drawing.plain == [slice(2, 3)]


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("vocab_size", [1, 3, 64, 700, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_equal_log_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    logits = random_logits(3, 300, vocab_size).to(dtype)
    tokens = torch.randint(vocab_size, (300,), generator=torch.Generator().manual_seed(1))
    reference = torch.log_softmax(logits.double(), -1)
    for index, told in enumerate(launch_logprobs(logits, tokens, 20).read()):
        own = reference[index]
        assert told.chosen == pytest.approx(float(own[tokens[index]]), abs=1e-5)
        assert told.rank == int((logits[index] > logits[index, tokens[index]]).sum()) + 1
        ids, values = zip(*told.top, strict=True)
        assert len(set(ids)) == len(ids) == min(20, vocab_size)
        assert list(values) == pytest.approx(own.topk(len(ids)).values.tolist(), abs=1e-5)
        assert list(values) == pytest.approx(own[list(ids)].tolist(), abs=1e-5)
        assert [*told.top] == sorted(told.top, key=lambda pair: (-pair[1], pair[0]))


def test_logprobs_are_of_the_model_and_for_those_that_ask() -> None:
    rows = [Row(sampling(logprobs=count, temperature=0.2, top_k=1, logit_bias=((3, 50.0),)), [1], 1) for count in (5, None, 0, 2)]
    logits = random_logits(3, 4, 50)
    told = tables(rows, 50).launch_logprobs(np.arange(4), logits, torch.tensor([7, 8, 9, 10])).read(skip={3})
    assert set(told) == {0, 2}
    assert told[0].chosen == pytest.approx(float(torch.log_softmax(logits, -1)[0, 7]), abs=1e-5)
    assert [token for token, _ in told[0].top] == logits[0].topk(5).indices.tolist()
    assert told[2].top == ()


def test_logprobs_of_spoilt_rows_are_numbers_in_range() -> None:
    logits = random_logits(3, 4, 50)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    alone = launch_logprobs(logits[3:], torch.tensor([5]), 20).read()
    told = launch_logprobs(logits, torch.tensor([5, 5, 5, 5]), 20).read()
    assert told[3:] == alone
    assert all(0 <= token < 50 for one in told for token, _ in one.top)
    assert launch_logprobs(logits[:0], torch.tensor([], dtype=torch.long), 3).read() == []

"""What the sampler launches waits for nothing; and what watches over that sees every way of waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runner.no_sync import NoSync, WouldWaitError, decide_as_on_a_gpu
from tests.runner.sampling_oracle import Row, positions, random_logits, rows_of, sampling, tables
from tests.runner.test_sampling_tables import Counting, with_processor

WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: (x * 2).tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "int": lambda x: int(x.argmax()),
    "float": lambda x: float(x[0]),
    "slice by a tensor": lambda x: torch.arange(9)[: x.argmax()],
    "take one": lambda x: torch.arange(9)[x.argmax()],
    "range": lambda x: range(x.argmax()),
    "cpu": lambda x: x.view(2, 2).T.cpu(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "nonzero": lambda x: x.nonzero(),
    "torch.nonzero": lambda x: torch.nonzero(x, as_tuple=True),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: torch.masked_select(x, torch.ones(4, dtype=torch.bool)),
    "take by a mask": lambda x: x[x > 0],
    "take by a mask among others": lambda x: x.view(2, 2)[0, x.view(2, 2)[1] > 0],
    "put by a mask": lambda x: torch.zeros(4).__setitem__(x > 0, 1.0),
    "put into by a mask": lambda x: x.__setitem__(torch.ones(4, dtype=torch.bool), 1.0),
    "argwhere": torch.argwhere,
    "equal": lambda x: torch.equal(torch.zeros(4), x),
    "repeat_interleave": lambda x: torch.arange(4).repeat_interleave(x.long().clamp(0, 1)),
    "contains": lambda x: 3.0 in x,
    "print": lambda x: f"{x.sum()}",
    "copied into": lambda x: torch.zeros(4).copy_(x).tolist(),
    "out": lambda x: _into(x).tolist(),
    "written through a view": lambda x: _through_a_view(x).tolist(),
    "given to a kernel": lambda x: _kernel(x).tolist(),
}


def _into(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4)
    torch.mul(x, 2, out=out)
    return out


def _through_a_view(x: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(8)
    whole[2:6] = x
    return whole


def _kernel(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4)
    assert x.data_ptr() != out.data_ptr()
    return out


@pytest.mark.parametrize("how", WAITING)
def test_every_way_of_waiting_is_seen(how: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with NoSync(x), pytest.raises(WouldWaitError):
        WAITING[how](x)


def test_what_does_not_wait_is_let_through() -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0])
    with NoSync(x):
        host = torch.arange(4)
        y = torch.where(x > 0, x, 0.0).index_add_(0, host, x)
        y[host] = x[x.argsort()]
        y.masked_fill_(y > 1, 3.0)
        assert (y.shape, len(y), y.dtype, y.numel()) == ((4,), 4, torch.float32, 4)
        assert host.tolist() == [0, 1, 2, 3]
        assert bool(host[host > 1].any())
    assert len(y.tolist()) == 4


# -- the sampler -------------------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.02},
    "typical_p": {"typical_p": 0.8},
    "all cuts": {"top_k": 50, "top_p": 0.9, "typical_p": 0.8, "min_p": 1e-3},
    "bias": {"logit_bias": ((3, 5.0),)},
    "allowed": {"allowed_token_ids": (1, 5, 77)},
    "bad words": {"bad_words": ((4,), (5,))},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": (2, 3)},
    "nothing is left": {"allowed_token_ids": (4,), "bad_words": ((4,),)},
    "logprobs": {"logprobs": 0},
    "top logprobs": {"logprobs": 20},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": -0.2},
    "long bad words": {"bad_words": ((4, 5), (1, 2, 3))},
}
REMEMBERS = ("penalties", "long bad words")
ROWS = [Row(sampling(seed=seed, **asked), [1, 2, 4], 2) for seed, asked in enumerate(ASKED.values())]


def launched_without_waiting(rows: list[Row], vocab_size: int) -> tuple[list[int], dict[int, Any]]:
    made, logits = tables(rows, vocab_size), random_logits(5, len(rows), vocab_size)
    batch = np.arange(len(rows))
    with NoSync(logits):
        tokens, finite = made.sample(batch, positions(rows), logits)
        told = made.launch_logprobs(batch, logits, tokens)
    assert finite.all()
    return tokens.tolist(), told.read()


@pytest.mark.parametrize("vocab_size", [90, 5000])
@pytest.mark.parametrize("case", [*ASKED, "all"])
def test_a_launch_waits_for_nothing(case: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decide_as_on_a_gpu(monkeypatch)
    rows = ROWS if case == "all" else [Row(sampling(seed=3, **ASKED[case]), [1, 2, 4], 2)] * 2
    tokens, told = launched_without_waiting(rows, vocab_size)
    monkeypatch.undo()
    made, logits = tables(rows, vocab_size), random_logits(5, len(rows), vocab_size)
    batch = np.arange(len(rows))
    wanted, _ = made.sample(batch, positions(rows), logits)
    assert tokens == wanted.tolist()
    assert told == made.launch_logprobs(batch, logits, wanted).read()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_gpu_cuts_as_a_processor_does(monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    """Where a processor looks whether a few logits tell, a GPU sorts them all."""
    vocab_size = data.draw(st.sampled_from([3, 90, 700, 5000]))
    rows = data.draw(st.lists(rows_of(vocab_size), min_size=1, max_size=5))
    logits = random_logits(data.draw(st.integers(0, 2**31)), len(rows), vocab_size, data.draw(st.sampled_from([0.3, 3.0])))
    batch = np.arange(len(rows))
    wanted, _ = tables(rows, vocab_size).sample(batch, positions(rows), logits)
    with monkeypatch.context() as patched:
        decide_as_on_a_gpu(patched)
        tokens, _ = tables(rows, vocab_size).sample(batch, positions(rows), logits)
    assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("case", ASKED)
def test_who_needs_its_history(case: str) -> None:
    made = tables(ROWS, 90)
    names = list(ASKED)
    assert made.needs_history(np.array([names.index(case)])) == (case in REMEMBERS)
    made.admit(names.index(case), Row(sampling(), [1], 1).params)
    assert not made.needs_history(np.array([names.index(case)]))
    rest = np.array([names.index(other) for other in names if other not in REMEMBERS])
    assert not made.needs_history(rest)
    assert made.needs_history(np.arange(len(names))) == (len({*REMEMBERS} - {case}) > 0)


@settings(max_examples=60)
@given(data=st.data())
def test_rows_that_need_no_history_are_sampled_alike_without_it(data: st.DataObject) -> None:
    rows = data.draw(st.lists(rows_of(40), min_size=1, max_size=5))
    made, logits = tables(rows, 40), random_logits(data.draw(st.integers(0, 99)), len(rows), 40)
    batch = np.arange(len(rows))
    free = [index for index in range(len(rows)) if not made.needs_history(batch[index : index + 1])]
    before, _ = made.sample(batch, positions(rows) + 1, logits)
    made.append(batch, data.draw(st.lists(st.integers(0, 39), min_size=len(rows), max_size=len(rows))))
    after, _ = made.sample(batch, positions(rows) + 1, logits)
    assert before[free].tolist() == after[free].tolist()


def test_processors_need_the_history() -> None:
    row = with_processor(Row(sampling(), [1], 1), True)
    made = tables([row, Row(sampling(), [1], 1)], 40, processors={"counting": Counting()})
    assert made.needs_history(np.array([1, 0]))
    assert not made.needs_history(np.array([1]))
    made.admit(0, Row(sampling(), [1], 1).params)
    assert not made.needs_history(np.array([0, 1]))

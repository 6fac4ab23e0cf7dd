"""A recorded pass gives what the pass itself would give on other inputs, or says that it cannot."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from streamkv_backends.cpu.backend import CpuBackend
from streamkv_backends.cpu.tape import Arena

LAYER = LayerSpec(2, 1, 32, 0.2)
BACKEND = CpuBackend()
OPS = BACKEND.ops
ROWS, WIDTH = 4, 64


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def one_token(position: int, backend: CpuBackend = BACKEND) -> Any:
    """A step of one sequence."""
    return backend.prepare(
        StepTensors(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([position + 1], dtype=torch.int32),
            torch.tensor([[0, 1, 2]], dtype=torch.int32),
            torch.tensor([position]),
        )
    )


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (ROWS, WIDTH), generator=torch.Generator().manual_seed(seed)).bfloat16()


def record(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """The recording; what recording gave must be the function's own result, and the inputs stay as they were."""
    BACKEND.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,)))
    wanted = function(*(value.clone() for value in inputs))
    before = [value.clone() for value in inputs]
    output, recorded = OPS.record(function, inputs)
    assert torch.equal(output, wanted)
    assert recorded is None or all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    return recorded


def replay(recorded: Any, *inputs: torch.Tensor) -> torch.Tensor | None:
    return BACKEND.replay(recorded, inputs, one_token(0))


# -- the arena --------------------------------------------------------------------------------------------------------------


class ArenaMachine(RuleBasedStateMachine):
    """Whoever holds a tensor, or a view of it, finds there what was written, whatever was handed out since."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena()
        self.held: list[tuple[torch.Tensor, int]] = []
        self.written = 0

    @rule(rows=st.integers(0, 5), width=st.sampled_from([16, 48]), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    def take(self, rows: int, width: int, dtype: torch.dtype) -> None:
        tensor = self.arena.empty((rows, width), dtype)
        assert tensor.shape == (rows, width)
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        self.written = self.written % 100 + 1
        self.held.append((tensor.fill_(self.written), self.written))

    @rule(which=st.integers(0, 100), kind=st.sampled_from(["row", "flat", "transposed", "parts", "every third"]))
    def keep_only_a_view(self, which: int, kind: str) -> None:
        if not self.held:
            return
        tensor, value = self.held.pop(which % len(self.held))
        if not tensor.numel() or tensor.dim() < 2:
            return
        views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "row": lambda x: x[-1],
            "flat": lambda x: x.view(-1) if x.is_contiguous() else x,
            "transposed": lambda x: x.t(),
            "parts": lambda x: x.split(8, dim=1)[-1],
            "every third": lambda x: x.detach()[:, ::3],
        }
        self.held.append((views[kind](tensor), value))

    @rule(which=st.integers(0, 100))
    def drop(self, which: int) -> None:
        if self.held:
            self.held.pop(which % len(self.held))

    @invariant()
    def nothing_is_overwritten(self) -> None:
        for tensor, value in self.held:
            assert bool((tensor == value).all())


TestArena = ArenaMachine.TestCase


def test_buffers_come_back_when_nobody_holds_them() -> None:
    arena = Arena()
    for _ in range(50):
        arena.empty((ROWS, WIDTH), torch.bfloat16)
    first = arena.num_bytes
    kept = [arena.empty((ROWS, WIDTH), torch.bfloat16) for _ in range(3)]
    assert first == ROWS * WIDTH * 2
    assert arena.num_bytes == 3 * first
    assert len({tensor.data_ptr() for tensor in kept}) == 3


# -- any pass -----------------------------------------------------------------------------------------------------------------

WEIGHT = random(100, WIDTH)
LINEAR = OPS.linear(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).requires_grad_(False), None)
assert LINEAR is not None

STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "norm": lambda x, _: OPS.rms_norm(x, WEIGHT, 1e-6, offset=0.0, round_first=True),
    "gate": lambda x, y: OPS.gate(torch.cat([x, y], dim=-1), "silu"),
    "linear": lambda x, _: LINEAR(x),
    "rotate": lambda x, y: OPS.rotate(x[None, None], y[None, None], x[None], y[None])[0][0, 0],
    "plain addition": lambda x, y: x + y,
    "addition with a factor": lambda x, y: torch.add(x, y, alpha=2),
    "addition of other dtypes": lambda x, y: (x.float() + y).bfloat16(),
    "addition of a row": lambda x, y: x + y[1],
    "addition of a part": lambda x, y: x[:, ::2].repeat(1, 2) + y,
    "addition of columns": lambda x, y: (x.t() + y.t()).t(),
    "product": lambda x, y: x * y,
    "in place": lambda x, y: x.add_(y),
    "in place through a view": lambda x, y: x.view(-1).mul_(0.5).view_as(y),
    "a row in place": lambda x, y: x.index_copy_(0, torch.tensor([1]), y[:1].clone()),
    "assigned": lambda x, y: x.masked_fill_(y > 1, 0.25),
    "two results": lambda x, _: torch.cat(torch.topk(x, WIDTH // 2, dim=-1)[:1] * 2, dim=-1),
    "results of other dtypes": lambda x, y: x.gather(-1, torch.sort(y, dim=-1).indices),
    "parts": lambda x, _: torch.cat(x.split(16, dim=-1)[::-1], dim=-1),
    "empty first": lambda x, y: torch.empty_like(x).copy_(y),
    "zeros first": lambda x, y: torch.zeros(ROWS, WIDTH, dtype=x.dtype).add_(y),
    "out": lambda x, y: torch.mul(x, y, out=torch.empty(ROWS, WIDTH, dtype=x.dtype)),
    "broadcast": lambda x, y: y.expand(2, ROWS, WIDTH).mean(0) * x.new_ones(()),
    "Python's numbers": lambda x, _: x * torch.tensor([1.5, -0.5], dtype=x.dtype).repeat_interleave(WIDTH // 2),
    "bounded": lambda x, _: (x / (1 + x.abs().amax())).clamp(-1, 1),
}


def program(names: list[tuple[str, int, int]]) -> Callable[..., torch.Tensor]:
    """Each step takes two of the last three results, all others are dropped: the arena hands their memory out again."""

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        held = [x, y, x * y]
        for name, first, second in names:
            held = [*held[1:], STEPS[name](held[first], held[second])]
        return torch.cat(held)

    return run


PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


@given(PROGRAMS)
def test_any_pass_replayed_is_that_pass(names: list[tuple[str, int, int]]) -> None:
    function = program(names)
    with torch.inference_mode():
        recorded = record(function, random(1), random(2))
        for seed in (3, 5):
            given_now = random(seed), random(seed + 1)
            wanted = function(*(value.clone() for value in given_now))
            again = replay(recorded, *given_now)
            assert again is not None
            assert torch.equal(again.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("name", STEPS)
def test_every_step_replayed_is_that_step(name: str) -> None:
    test_any_pass_replayed_is_that_pass.hypothesis.inner_test([(name, 0, 1), ("bounded", 2, 2), (name, 1, 0), (name, 2, 1)])  # type: ignore[attr-defined]  # what Hypothesis hangs on a test


MADE: dict[str, Callable[[], torch.Tensor]] = {
    "Python's": lambda: torch.tensor([0.5, 2.0] * 32, dtype=torch.bfloat16),
    "numpy's": lambda: torch.from_numpy(np.array([0x3F00, 0x4000] * 32, dtype=np.int16)).view(torch.bfloat16),
}


@pytest.mark.parametrize("whose", MADE)
def test_numbers_made_on_the_way_stay_where_a_native_call_reads_them(whose: str) -> None:
    made = MADE[whose]
    recorded = record(lambda x: OPS.rms_norm(x, made(), 1e-6, offset=0.0, round_first=True), random(1))
    gc.collect()
    _others = [torch.full((WIDTH,), 9.0, dtype=torch.bfloat16) for _ in range(200)]
    _arrays = [np.full(WIDTH, 9, dtype=np.int16) for _ in range(200)]
    wanted = OPS.rms_norm(random(3), made(), 1e-6, offset=0.0, round_first=True)
    again = replay(recorded, random(3))
    assert again is not None
    assert torch.equal(again, wanted)


def test_memory_is_that_of_what_is_live_at_once() -> None:
    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = x + STEPS["norm"](x, x)
        return x

    recorded = record(deep, random(1))
    assert recorded.num_native == 100
    assert recorded.num_torch == 0
    assert recorded.num_bytes <= 4 * ROWS * WIDTH * 2


def test_inputs_are_copied_and_the_result_is_overwritten() -> None:
    recorded = record(lambda x: x.mul_(2) + 1, random(1))
    mine = random(3)
    first = replay(recorded, mine)
    assert first is not None
    assert torch.equal(mine, random(3)), "what the pass does to its input in place stays inside"
    kept = first.clone()
    second = replay(recorded, random(4))
    assert second is not None
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, kept)


# -- what Python decides by ---------------------------------------------------------------------------------------------------

DECIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda x: x * 2 if x[0, 0] > 0 else x * 3,
    "item": lambda x: x * 2 if x[0, 0].item() > 0 else x * 3,
    "int": lambda x: x * int(x[0, 0] > 0),
    "float": lambda x: x * float(x[0, 0]),
    "equal": lambda x: x * 2 if torch.equal(x[0, 0], x[0, 0].abs()) else x * 3,
    "any": lambda x: x * 2 if (x[0, :1] > 0).any() else x * 3,
    "in": lambda x: x * 2 if 1.0 in x[0, :1].sign() else x * 3,
    "index": lambda x: x[(x[0, 0] > 0).long()] * 2,
    "loop": lambda x: x * sum(float(value) for value in x[0, :1].sign()),
    "shape": lambda x: x * len((x[0, :1] > 0).nonzero()),
}


@pytest.mark.parametrize("name", DECIDES)
def test_another_value_than_python_decided_by_is_another_path(name: str) -> None:
    positive = random(1)
    positive[0, 0] = 1.0
    recorded = record(DECIDES[name], positive)
    same = random(3)
    same[0, 0] = 1.0
    again = replay(recorded, same)
    assert again is not None
    assert torch.equal(again, DECIDES[name](same))
    other = random(3)
    other[0, 0] = -1.0
    again = replay(recorded, other)
    assert again is None or torch.equal(again, DECIDES[name](other))
    assert again is None or name == "index"


READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tolist": lambda x: x * 2 if x[0].tolist()[0] > 0 else x * 3,
    "numpy": lambda x: x * 2 if x[0].float().numpy()[0] > 0 else x * 3,
    "array": lambda x: x * 2 if np.asarray(x[0].float())[0] > 0 else x * 3,
    "dlpack": lambda x: x * 2 if np.from_dlpack(x[0].float())[0] > 0 else x * 3,
}


@pytest.mark.parametrize("name", READS)
def test_a_pass_that_reads_a_tensor_is_not_recorded(name: str) -> None:
    assert record(READS[name], random(1)) is None
    assert torch.equal(OPS.rms_norm(random(1), WEIGHT, 1e-6, offset=0.0, round_first=True), STEPS["norm"](random(1), WEIGHT))


def test_a_pass_that_fails_while_it_is_recorded_leaves_nothing_behind() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the model's own")

    with pytest.raises(ValueError, match="own"):
        OPS.record(fails, (random(1),))
    first, second = (STEPS["norm"](random(1), WEIGHT) for _ in range(2))
    assert first.data_ptr() != second.data_ptr(), "results are no longer an arena's"
    assert record(lambda x: x * 2, random(1)) is not None


# -- attention ----------------------------------------------------------------------------------------------------------------


def attends(metadata: list[Any]) -> Callable[..., torch.Tensor]:
    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return BACKEND.attend(query * 2, key, value, 0, metadata[0])

    return run


def heads(seed: int) -> tuple[torch.Tensor, ...]:
    return random(seed, 1, 2, 32), random(seed + 1, 1, 1, 32), random(seed + 2, 1, 1, 32)


def test_attention_replayed_writes_and_reads_where_the_step_says() -> None:
    now = [one_token(0)] if BACKEND.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,))) else []
    function = attends(now)
    wanted = []
    for position in range(4):
        now[0] = one_token(position)
        wanted.append(function(*heads(position)).clone())
    BACKEND.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,)))
    now[0] = one_token(0)
    output, recorded = OPS.record(function, heads(0))
    assert torch.equal(output, wanted[0])
    for position in range(1, 4):
        again = BACKEND.replay(recorded, heads(position), one_token(position))
        assert again is not None
        assert torch.equal(again, wanted[position])


def test_a_recording_ends_with_the_pool_that_it_was_made_over() -> None:
    """It holds addresses, and the memory may be somebody else's by now."""
    _first = BACKEND.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,)))  # held, so that a wrong replay harms nobody here
    function = attends([one_token(0)])
    _, recorded = OPS.record(function, heads(0))
    assert BACKEND.replay(recorded, heads(0), one_token(0)) is not None
    pool = BACKEND.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,)))
    assert BACKEND.replay(recorded, heads(0), one_token(0)) is None
    assert not pool.layers[0].any()


def test_large_steps_are_padded_and_recorded_if_all_decode() -> None:
    sizes = (1, 33, 64, 65, 96, 97, 256, 257)
    assert [BACKEND.recorded_size(size) for size in sizes] == [1, 33, 64, 96, 96, 128, 256, None]

    def step(num_seqs: int, each: int) -> Any:
        ends = torch.arange(num_seqs + 1, dtype=torch.int32) * each
        lengths, table = torch.full((num_seqs,), each, dtype=torch.int32), torch.zeros((num_seqs, 8), dtype=torch.int32)
        return BACKEND.prepare(StepTensors(ends, lengths, table, torch.arange(num_seqs * each)))

    for num_seqs, each in ((96, 1), (64, 1), (1, 64), (16, 4)):
        assert BACKEND.recording_key(step(num_seqs, each)) is not None
    for num_seqs, each in ((1, 96), (48, 2)):
        assert BACKEND.recording_key(step(num_seqs, each)) is None


class Listening:
    """The library, with an ear on how many threads recorded steps are run by."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.threads: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def skv_run(self, operations: Any, count: int, plans: Any, threads: int, seconds: Any) -> None:
        self.threads.append(threads)
        self._native.skv_run(operations, count, plans, threads, seconds)


@pytest.mark.parametrize(("then", "later"), [(1, 4), (3, 1)])
def test_no_more_threads_run_it_than_its_scratch_was_measured_for(native: Any, then: int, later: int) -> None:
    listening = Listening(native)
    backend = CpuBackend(native=listening)
    backend.allocate_kv(KVSpec(3, 16, torch.bfloat16, (LAYER,)))
    linear = backend.ops.linear(nn.Linear(640, 640, dtype=torch.bfloat16).requires_grad_(False), None)
    assert linear is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(then)
        _, recorded = backend.ops.record(lambda x: linear(x) + x, (random(1, 3, 640),))
        torch.set_num_threads(later)
        again = backend.replay(recorded, (random(2, 3, 640),), one_token(0, backend))
    finally:
        torch.set_num_threads(before)
    assert again is not None
    assert torch.equal(again, linear(random(2, 3, 640)) + random(2, 3, 640))
    assert listening.threads == [then]


# -- ends -----------------------------------------------------------------------------------------------------------------------


def test_a_recording_and_a_plan_go_with_their_last_holder() -> None:
    freed: list[str] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.float().softmax(-1)
        weakref.finalize(y, freed.append, "result")
        return STEPS["norm"](y.bfloat16() + x, x)

    recorded = record(run, random(1))
    freed.clear()  # of the first, plain pass
    gc.collect()
    assert freed == []
    weakref.finalize(recorded, freed.append, "recording")
    del recorded
    gc.collect()
    assert sorted(freed) == ["recording", "result"]
    metadata = one_token(0)
    plan = metadata.plan(LAYER)
    weakref.finalize(plan, freed.append, "plan")
    del plan, metadata
    gc.collect()
    assert "plan" in freed

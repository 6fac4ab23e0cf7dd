"""What a launch costs the host, and whether a recorded step serves the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.batch import Batch, make_batch
from benchmarks.gpu.machine import Call, Machine
from benchmarks.gpu.stage import Row
from benchmarks.gpu.stages.attention import decode_calls, prefill_calls, spec_of
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.device import Variant
from streamkv_kernels.kv_write import KVWriter
from streamkv_kernels.rows import RowKernels

__all__ = ["graphs", "launch_cost"]


def launch_cost(machine: Machine) -> Iterator[Row]:
    """Microseconds of the host a call, beside torch's own. The device has next to nothing to do."""
    place = machine.place
    number, order = torch.zeros(16, device=place), torch.zeros(1, dtype=torch.int64, device=place)
    memory, out = torch.zeros(4096, dtype=torch.uint8, device=place), torch.zeros(512, dtype=torch.int32, device=place)
    kernel = machine.kernels.kernel(Variant("stream"), "read_pieces")
    bound = kernel.bind(memory, order, out, 1, 4096)
    spec = spec_of((4, 2), 64) if machine.tiny else spec_of()
    batch = make_batch(machine, spec, [(1, 15)] * 2, 16, max_layers=1)
    chunk = make_batch(machine, spec, [(20, 12)], 16, max_layers=1)
    rows, x = RowKernels(machine.kernels, torch.bfloat16), torch.zeros(1, 1024, dtype=torch.bfloat16, device=place)
    calls: dict[str, Call] = {
        "torch: add_": partial(number.add_, 1.0),
        "torch: empty": partial(torch.empty, 16, device=place),
        "a kernel of 5 arguments, bound before": partial(bound.launch, (1, 1, 1), (512, 1, 1)),
        "the same, bound each time": partial(kernel.launch, (1, 1, 1), (512, 1, 1), memory, order, out, 1, 4096),
        "decode and merge of 40 arguments, bound before": decode_calls(machine, batch)[0],
        "prefill, checked and bound each time": prefill_calls(machine, chunk)[0],
        "RMS norm with its checks": partial(rows.rms_norm, x, x[0], 1e-6, offset=0.0, round_first=True),
    }
    for name, call in calls.items():
        seconds = machine.host_seconds(call)
        yield {"call": name, "host µs": None if seconds is None else seconds * 1e6}


def graphs(machine: Machine) -> Iterator[Row]:
    """A step is recorded once and replayed for other lengths: to the bit what the same calls give one by one.

    Raises:
        AssertionError: it gives something else.
    """
    spec = spec_of((4, 2), 64) if machine.tiny else spec_of()
    steps = [[70, 33, 16], [71, 34, 17], [5, 200, 90]]
    longest = [(1, max(step[number] for step in steps) - 1) for number in range(3)]
    batch = make_batch(machine, spec, longest, 16, max_layers=1)
    new = torch.randn(3, 2 * spec.num_kv_heads, spec.head_dim, device=machine.place).to(spec.dtype)
    weight = torch.ones(spec.head_dim, dtype=spec.dtype, device=machine.place)
    slots = torch.zeros(3, dtype=torch.int64, device=machine.place)
    attention = DecodeAttention(machine.kernels, spec, 3, machine.place)
    launch = attention.bind(batch.query, batch.caches[0], batch.tables, batch.out).launch
    writer, rows = KVWriter(machine.kernels, spec.dtype), RowKernels(machine.kernels, spec.dtype)
    kept: list[torch.Tensor] = []

    def step() -> None:
        writer.write(new[:, : spec.num_kv_heads], new[:, spec.num_kv_heads :], slots, batch.caches[0])
        launch()
        kept[:] = [rows.rms_norm(batch.out, weight, 1e-6, offset=0.0, round_first=True)]

    _prepare(attention, batch, slots, steps[0])
    replay = machine.recorded(step)
    (result,) = kept  # where the graph writes
    for lengths in steps:
        _prepare(attention, batch, slots, lengths)
        new.copy_(torch.randn_like(new))
        step()
        expected = kept[0].clone()
        for tensor in (batch.out, result):
            tensor.fill_(float("nan"))
        replay()
        machine.synchronize()
        given = result if machine.timed else kept[0]
        equal = torch.equal(given.view(torch.int16), expected.view(torch.int16))
        yield {"lengths": ", ".join(map(str, lengths)), "equal to the calls one by one": equal}
        assert equal, f"the graph gives something else for lengths {lengths}"


def _prepare(attention: DecodeAttention, batch: Batch, slots: torch.Tensor, lengths: list[int]) -> None:
    seq_lens = np.array(lengths, dtype=np.int32)
    attention.load(attention.plan(batch.query_start, seq_lens))
    last = torch.from_numpy(seq_lens - 1).long()
    blocks = batch.tables.cpu()[torch.arange(len(last)), last // 16].long()
    slots.copy_(blocks * 16 + last % 16)

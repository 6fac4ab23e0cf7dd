"""Right or wrong, before anything is timed: the traps and the judge of the kernels' tests, on this device.

"error" is that of the kernel over that of plain torch in the same dtype, both against float64; up to 1 is no worse than torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import Row
from streamkv.runner.params import RowParams
from streamkv.runner.sampling_tables import RowSampler
from streamkv.sampling_params import Sampling
from streamkv_backends.cuda.ops import CudaOps
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix
from streamkv_kernels.device import Device
from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.kv_write import KVWriter, LayerCache
from streamkv_kernels.prefill_plan import shared_prefixes
from streamkv_kernels.rows import RowKernels
from streamkv_kernels.sampling import SamplingKernels
from tests.kernels.paged import Paged, spec_of

__all__ = ["correctness"]

BF16, F16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
FEW = [(1, 1), (1, 15), (1, 16), (1, 17), (3, 33), (4, 170), (1, 1300), (1, 0), (2, 65)]
MANY = [(1, 1), (15, 15), (17, 64), (0, 9), (1, 130), (2, 0), (70, 200), (5, 16), (9, 1100)]


def correctness(machine: Machine) -> Iterator[Row]:
    """One row a kind of case, the worst of it.

    Raises:
        AssertionError: something is wrong; the rows say what.
    """
    wrong = []
    for row in _cases(machine):
        good = row["error"] <= row["allowed"] and row["equal twice"]
        wrong += [] if good else [row["case"]]
        yield row
    if wrong:
        raise AssertionError(f"wrong: {'; '.join(wrong)}")


def _cases(machine: Machine) -> Iterator[Row]:
    dtypes = ((BF16, BF16), (F16, F16), (BF16, E4M3), (BF16, INT8), (F16, E4M3), (F16, INT8))
    head_dims = (64,) if machine.tiny else (64, 80, 96, 128, 256)
    for (dtype, cache_dtype), head_dim in product(dtypes[:1] if machine.tiny else dtypes, head_dims):
        spec = spec_of((8, 2), head_dim, dtype, cache_dtype)
        yield _row(f"decode {dtype} {cache_dtype} {head_dim}", machine, [Paged(spec, FEW)], _decode)
        yield _row(f"prefill {dtype} {cache_dtype} {head_dim}", machine, [Paged(spec, MANY)], _prefill)
    lengths = [(1, 40), (4, 64), (2, 300)]
    variations = [
        *(Paged(spec_of(heads), lengths, size) for heads, size in product(((4, 4), (14, 2), (16, 1)), (16, 32, 64))),
        *(Paged(spec_of(window=window, soft_cap=cap), [*FEW, (16, 60)]) for window, cap in product((1, 17, 100), (None, 20.0))),
    ]
    variations = variations[::5] if machine.tiny else variations
    yield _row("decode, groups, block sizes, windows, soft-caps", machine, variations, _decode)
    yield _row("prefill, groups, block sizes, windows, soft-caps", machine, variations, _prefill)
    yield _row("prefill, two row tiles a warp", machine, [Paged(spec_of(), [*MANY, (200, 300)])], _wide_prefill)
    yield _row("shared prefix", machine, [_sharing()], _cascade)
    if machine.fits(5e9) and not machine.tiny:
        yield _row("decode beyond 2^31 bytes", machine, [_far_apart(machine)], _decode)
        yield _row("prefill beyond 2^31 bytes", machine, [_far_apart(machine)], _prefill)
    for name, function in _SMALL.items():
        yield _beside_emulator(name, machine, function)


def _row(name: str, machine: Machine, batches: list[Paged], run: Callable[[Machine, Paged], torch.Tensor]) -> Row:
    worst, equal = 0.0, True
    for batch in batches:
        first, second = run(machine, batch), run(machine, batch)
        equal &= torch.equal(first.view(torch.int16), second.view(torch.int16))
        worst = max(worst, batch.judge(first))
    return {"case": name, "error": worst, "allowed": 2.0, "equal twice": equal}


def _placed(machine: Machine, batch: Paged) -> tuple[torch.Tensor, LayerCache, torch.Tensor, torch.Tensor]:
    place, cache = machine.place, batch.cache
    parts = [
        part if part is None else part.to(place) for part in (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    ]
    return batch.query.to(place), LayerCache(*parts), batch.block_tables.to(place), batch.out().to(place)  # type: ignore[arg-type]  # a list of tensors or None


def _decode(machine: Machine, batch: Paged) -> torch.Tensor:
    query, cache, tables, out = _placed(machine, batch)
    decode = DecodeAttention(machine.kernels, batch.spec, len(batch.lengths), machine.place)
    decode.load(decode.plan(batch.query_start, batch.seq_lens))
    decode.launch(query, cache, tables, out)
    return out.cpu()


def _prefill(machine: Machine, batch: Paged, max_rows: int = 64) -> torch.Tensor:
    query, cache, tables, out = _placed(machine, batch)
    prefill = PrefillAttention(machine.kernels, batch.spec, max_rows=max_rows, place=machine.place)
    prefill.load(prefill.plan(np.diff(batch.query_start), batch.seq_lens))
    prefill.launch(query, cache, tables, *_lengths(machine, batch), out)
    return out.cpu()


def _wide_prefill(machine: Machine, batch: Paged) -> torch.Tensor:
    one = _Narrow(machine.kernels)
    return _prefill(replace(machine, kernels=one), batch, 128)


def _cascade(machine: Machine, batch: Paged) -> torch.Tensor:
    query, cache, tables, out = _placed(machine, batch)
    new = np.diff(batch.query_start)
    groups = shared_prefixes(batch.block_tables.numpy(), (batch.seq_lens - new) // 16)
    shared = SharedPrefix(machine.kernels, batch.spec, place=machine.place, max_rows=64)
    shared.load(shared.plan(groups, batch.query_start, batch.block_tables.numpy(), 16))
    prefix = shared.launch(query, cache)
    begins = np.zeros(len(new), dtype=np.int32)
    for members, blocks in groups:
        begins[members] = blocks * 16
    prefill = PrefillAttention(machine.kernels, batch.spec, max_rows=64, place=machine.place)
    prefill.load(prefill.plan(new, batch.seq_lens, chosen=new > 4, prefix_lens=begins))
    prefill.launch(query, cache, tables, *_lengths(machine, batch), out, prefix=prefix)
    decode = DecodeAttention(machine.kernels, batch.spec, len(new), machine.place)
    decode.load(decode.plan(batch.query_start, batch.seq_lens, begins=begins, chosen=(new > 0) & (new <= 4)))
    decode.launch(query, cache, tables, out, prefix=prefix)
    return out.cpu()


def _lengths(machine: Machine, batch: Paged) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.query_start).to(machine.place), torch.from_numpy(batch.seq_lens).to(machine.place)


class _Narrow:
    """A device that says it has one multiprocessor, so that plans are made for wide tiles."""

    num_sms = 1

    def __init__(self, device: Device) -> None:
        self.name, self.kernel = device.name, device.kernel


def _sharing() -> Paged:
    batch = Paged(spec_of((8, 2)), [(1, 1200), (1, 1130), (3, 1140), (40, 1170), (1, 1200), (1, 300)])
    for sequence in range(1, 5):
        batch.block_tables[sequence, :70] = batch.block_tables[0, :70]
        for own, first in zip(batch.contexts[sequence], batch.contexts[0], strict=True):
            own[:1120] = first[:1120]
    return batch


def _far_apart(machine: Machine) -> Paged:
    """Two blocks, more than 2^31 elements between them."""
    batch = Paged(spec_of((4, 2), 64, BF16, INT8), [(4, 30)])
    memory = torch.zeros(2 * (2**31 + 4096), dtype=INT8, device=machine.place)
    views = [memory.as_strided((2, 2, 16, 64), (2**31 + 4096, 1024, 64, 1), start) for start in (0, 2**30)]
    old = batch.block_tables[0, :2].long()
    for view, now in zip(views, (batch.cache.keys, batch.cache.values), strict=True):
        view.copy_(now[old])
    scales = [part[old].contiguous() for part in (batch.cache.key_scales, batch.cache.value_scales) if part is not None]
    batch.cache = LayerCache(*views, *(scale.to(machine.place) for scale in scales))
    batch.block_tables[0, :2] = torch.tensor([0, 1])
    return batch


def _numbers(*shape: int, place: torch.device, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(place)


def _rms_norm(device: Device, place: torch.device) -> torch.Tensor:
    rows = RowKernels(device, BF16)
    return rows.rms_norm(_numbers(5, 1024, place=place), _numbers(1024, place=place), 1e-6, offset=0.0, round_first=True)


def _gate(device: Device, place: torch.device) -> torch.Tensor:
    return RowKernels(device, BF16).gate(_numbers(5, 2048, place=place), "silu")


def _rotate(device: Device, place: torch.device) -> torch.Tensor:
    query, key = _numbers(1, 4, 7, 64, place=place), _numbers(1, 2, 7, 64, place=place)
    angle = torch.arange(7.0)[:, None] * torch.ones(64)
    cos, sin = (f(angle)[None].to(BF16).to(place) for f in (torch.cos, torch.sin))
    return torch.cat([part.flatten() for part in RowKernels(device, BF16).rotate(query, key, cos, sin)])


def _kv_write(device: Device, place: torch.device) -> torch.Tensor:
    pool = torch.zeros(4, 2, 2, 16, 64, dtype=BF16, device=place)
    slots = torch.tensor([5, 63, -1, 17, 0], device=place)
    key, value = _numbers(5, 2, 64, place=place), -_numbers(5, 2, 64, place=place)
    KVWriter(device, BF16).write(key, value, slots, LayerCache(pool[:, 0], pool[:, 1]))
    return pool


def _most_probable(device: Device, place: torch.device) -> torch.Tensor:
    return SamplingKernels(device).most_probable(_numbers(6, 5000, place=place))[0]


def _sampler(device: Device, place: torch.device) -> torch.Tensor:
    """The runner's sampler over rows of all kinds, twice; on a GPU the second time nothing may wait for it."""
    sampler = RowSampler(num_rows=len(_ASKED), max_len=20, vocab_size=5000, device=place, ops=CudaOps(device, BF16))
    rows, logits = np.arange(len(_ASKED)), _numbers(len(_ASKED), 5000, place=place)
    found = []
    for again in (False, True):
        for row, asked in enumerate(_ASKED):
            sampler.admit(row, RowParams(Sampling(max_tokens=9, seed=row, **asked), 0, [1, 2, 3], 2))
        if again and place.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, finite = sampler.sample(rows, np.full(len(_ASKED), 3, np.int64), logits)
            told = sampler.launch_logprobs(rows, logits, tokens)
        finally:
            if place.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        ranks = torch.tensor([one.rank for one in told.read().values()], device=place)
        found.append(torch.cat([tokens, finite.long(), ranks]))
    return torch.stack(found)


_ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 9, "logprobs": 0},
    {"top_p": 0.8, "logprobs": 3},
    {"min_p": 0.05},
    {"typical_p": 0.7},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"bad_words": ((4,), (3, 5)), "logit_bias": ((7, 3.0),)},
    {"allowed_token_ids": (6, 99, 4000)},
    {"min_tokens": 3, "stop_token_ids": (2, 9)},
)

_SMALL: dict[str, Callable[[Device, torch.device], torch.Tensor]] = {
    "RMS norm": _rms_norm,
    "SiLU · up": _gate,
    "rotary embedding": _rotate,
    "KV write": _kv_write,
    "most probable token": _most_probable,
    "the sampler, which does not wait": _sampler,
}


def _beside_emulator(name: str, machine: Machine, function: Callable[[Device, torch.device], torch.Tensor]) -> Row:
    """Small kernels are proven on the emulator: here they must give what they give there, but for the last bit of a rounding."""
    emulated = function(EmulatedDevice(optimize=1), torch.device("cpu")).double()
    first, second = (function(machine.kernels, machine.place).cpu() for _ in range(2))
    difference: Any = ((first.double() - emulated).abs() / emulated.abs().clamp(min=1.0)).max()
    return {
        "case": f"{name}, beside the emulator",
        "error": float(difference),
        "allowed": 2**-7,
        "equal twice": torch.equal(first, second),
    }

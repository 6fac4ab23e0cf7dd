"""How fast attention is, as a share of what reading (decode) or multiplying (prefill) can be on this device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch

from benchmarks.gpu.batch import Batch, Layout, make_batch
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stage import Row
from streamkv_kernels.attention import AttentionSpec, States
from streamkv_kernels.attn_decode import DecodeAttention
from streamkv_kernels.attn_prefill import PrefillAttention, SharedPrefix

__all__ = ["cascade", "decode", "decode_calls", "layouts", "prefill", "prefill_calls", "spec_of"]

BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
K = 1024


def spec_of(heads: tuple[int, int] = (32, 8), head_dim: int = 128, cache_dtype: torch.dtype = BF16) -> AttentionSpec:
    """Layers of a model of this shape."""
    return AttentionSpec(*heads, head_dim, BF16, cache_dtype, head_dim**-0.5)


def decode(machine: Machine) -> Iterator[Row]:
    """Batches and contexts; then dtypes, heads, block sizes, unequal lengths."""
    if machine.tiny:
        yield _decoded(machine, spec_of((4, 2), 64), [70, 30], 16)
        return
    for length, seqs in product((K, 4 * K, 16 * K, 64 * K, 128 * K), (1, 4, 16, 64, 256)):
        yield from _decoded_if_it_fits(machine, spec_of(), [length] * seqs, 16)
    for seqs, length in ((1, 128 * K), (16, 16 * K), (64, 4 * K)):
        for heads, cache_dtype, size in (
            *(((32, 8), dtype, 16) for dtype in (E4M3, INT8)),
            *((heads, BF16, 16) for heads in ((8, 1), (32, 32), (64, 8))),
            ((32, 8), BF16, 64),
        ):
            yield from _decoded_if_it_fits(machine, spec_of(heads, 128, cache_dtype), [length] * seqs, size)
    yield from _decoded_if_it_fits(machine, spec_of(), [128 * K] + [K] * 63, 16)
    yield from _decoded_if_it_fits(machine, spec_of(), np.linspace(100, 8000, 64).astype(int).tolist(), 16)


def prefill(machine: Machine) -> Iterator[Row]:
    """Chunks on contexts, one or several at a time, alone or among decodes."""
    if machine.tiny:
        yield _prefilled(machine, spec_of((4, 2), 64), [(40, 0), (3, 50)])
        return
    for new, context in product((512, 2 * K, 8 * K), (0, 8 * K, 32 * K)):
        yield _prefilled(machine, spec_of(), [(new, context)])
    yield _prefilled(machine, spec_of(), [(512, 0)] * 16)
    yield _prefilled(machine, spec_of(), [(2 * K, 6 * K), (512, 512), (64, 30 * K)] + [(1, 4 * K)] * 32)
    yield _prefilled(machine, spec_of((64, 8)), [(8 * K, 0)])
    yield _prefilled(machine, spec_of(cache_dtype=E4M3), [(8 * K, 0)])
    yield _prefilled(machine, spec_of(head_dim=256), [(8 * K, 0)])


def cascade(machine: Machine) -> Iterator[Row]:
    """Many streams on one long prefix: read by each of them, or once for all."""
    seqs, shared, own = (4, 128, 20) if machine.tiny else (64, 32 * K, 256)
    spec = spec_of((4, 2), 64) if machine.tiny else spec_of()
    batch = make_batch(machine, spec, [(1, shared + own - 1)] * seqs, 16, max_layers=8)
    batch.tables[:, : shared // 16] = batch.tables[0, : shared // 16]
    plain = machine.seconds(decode_calls(machine, batch))
    prefix = SharedPrefix(machine.kernels, spec, place=machine.place)
    groups = [(list(range(seqs)), shared // 16)]
    prefix.load(prefix.plan(groups, batch.query_start, batch.tables.cpu().numpy(), 16))
    attention = DecodeAttention(machine.kernels, spec, seqs, machine.place)
    attention.load(attention.plan(batch.query_start, batch.seq_lens, begins=np.full(seqs, shared, dtype=np.int32)))

    def layer(number: int) -> torch.Tensor:
        states: States = prefix.launch(batch.query, batch.caches[number])
        attention.launch(batch.query, batch.caches[number], batch.tables, batch.out, prefix=states)
        return batch.out

    joined = machine.seconds([partial(layer, number) for number in range(len(batch.caches))])
    times = None if plain is None or joined is None else plain / joined
    yield {
        "streams": seqs,
        "shared tokens": shared,
        "own": own,
        "plain µs": _micro(plain),
        "cascade µs": _micro(joined),
        "faster": times,
    }


def layouts(machine: Machine) -> Iterator[Row]:
    """Whether it matters where a layer's blocks lie: beside the other layers' (block first) or together, in a row or shuffled."""
    shapes = [(2, 60)] if machine.tiny else [(1, 128 * K), (16, 16 * K), (64, 4 * K), (256, K)]
    spec = spec_of((4, 2), 64) if machine.tiny else spec_of()
    both: tuple[Layout, ...] = ("block first", "layer first")
    for (seqs, length), layout, shuffled in product(shapes, both, (False, True)):
        row = _decoded(machine, spec, [length] * seqs, 16, layout, shuffled=shuffled)
        yield {"layout": layout, "blocks": "shuffled" if shuffled else "in a row", **row}


def decode_calls(machine: Machine, batch: Batch) -> list[partial[None]]:
    """A launch for each layer."""
    attention = DecodeAttention(machine.kernels, batch.spec, len(batch.seq_lens), machine.place)
    attention.load(attention.plan(batch.query_start, batch.seq_lens))
    return [partial(attention.bind(batch.query, cache, batch.tables, batch.out).launch) for cache in batch.caches]


def prefill_calls(machine: Machine, batch: Batch) -> list[partial[None]]:
    """The same of prefill, for sequences with many new tokens; decode for the others."""
    new = np.diff(batch.query_start)
    many = new * batch.spec.group > 16
    attention = PrefillAttention(machine.kernels, batch.spec, place=machine.place)
    attention.load(attention.plan(new, batch.seq_lens, chosen=many))
    starts = torch.from_numpy(batch.query_start).to(machine.place)
    lengths = torch.from_numpy(batch.seq_lens).to(machine.place)
    few = None
    if not many.all():
        few = DecodeAttention(machine.kernels, batch.spec, len(new), machine.place)
        few.load(few.plan(batch.query_start, batch.seq_lens, chosen=~many))

    def layer(number: int) -> None:
        attention.launch(batch.query, batch.caches[number], batch.tables, starts, lengths, batch.out)
        if few is not None:
            few.launch(batch.query, batch.caches[number], batch.tables, batch.out)

    return [partial(layer, number) for number in range(len(batch.caches))]


def _decoded_if_it_fits(machine: Machine, spec: AttentionSpec, lengths: list[int], block_size: int) -> Iterator[Row]:
    if machine.fits(sum(lengths) * _bytes_per_token(spec)) and sum(lengths) * _bytes_per_token(spec) < 60e9:
        yield _decoded(machine, spec, lengths, block_size)


def _decoded(
    machine: Machine,
    spec: AttentionSpec,
    lengths: list[int],
    block_size: int,
    layout: Layout = "block first",
    *,
    shuffled: bool = True,
) -> Row:
    batch = make_batch(machine, spec, [(1, length - 1) for length in lengths], block_size, layout=layout, shuffled=shuffled)
    seconds = machine.seconds(decode_calls(machine, batch))
    read = sum(lengths) * _bytes_per_token(spec)
    rate = None if seconds is None else read / seconds
    return {
        "heads": f"{spec.num_heads}/{spec.num_kv_heads}",
        "KV": str(spec.cache_dtype).removeprefix("torch."),
        "block": block_size,
        "streams": len(lengths),
        "tokens": f"{max(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}",
        "KV MB": read / 1e6,
        "layers": len(batch.caches),
        "µs": _micro(seconds),
        "GB/s": None if rate is None else rate / 1e9,
        "of reading": machine.share(rate, "read"),
    }


def _prefilled(machine: Machine, spec: AttentionSpec, lengths: list[tuple[int, int]]) -> Row:
    batch = make_batch(machine, spec, lengths, 16, max_layers=8)
    seconds = machine.seconds(prefill_calls(machine, batch))
    pairs = sum(new * context + new * (new + 1) / 2 for new, context in lengths)
    operations = 4 * pairs * spec.num_heads * spec.head_dim
    rate = None if seconds is None else operations / seconds
    return {
        "heads": f"{spec.num_heads}/{spec.num_kv_heads}",
        "head dim": spec.head_dim,
        "KV": str(spec.cache_dtype).removeprefix("torch."),
        "new on context": ", ".join(f"{new} on {context}" for new, context in dict.fromkeys(lengths)),
        "sequences": len(lengths),
        "µs": _micro(seconds),
        "TFLOP/s": None if rate is None else rate / 1e12,
        "of a product": machine.share(rate, "matmul"),
    }


def _bytes_per_token(spec: AttentionSpec) -> int:
    item = spec.cache_dtype.itemsize
    return 2 * spec.num_kv_heads * (spec.head_dim * item + (4 if item == 1 else 0))


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6

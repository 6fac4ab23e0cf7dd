"""kv_write.cu: keys, values and queries against float64 as exact as torch's own; nothing is written but where a slot says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamkv_kernels.emulated import EmulatedDevice
from streamkv_kernels.kv_write import Angles, KVWriter, LayerCache, Norms, Rope, rope_table
from streamkv_kernels.rows import RowKernels
from tests.kernels.small import NAN, as_exact_as_torch, in_every_schedule, random, same_bits, spaced

BF16, F16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
EPS = 1e-6
LONGEST = 40  # positions of the table


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for, and a batch."""

    head_dim: int
    io: torch.dtype = BF16
    kv: torch.dtype = BF16
    rotated: int = 0  # numbers of a head; 0 = none
    interleaved: bool = False
    normed: bool = False
    offset: float = 0.0
    heads: int = 6
    kv_heads: int = 2
    block_size: int = 16
    num_tokens: int = 7
    seed: int = 0


SHAPES = {
    "written as they are": Shape(64),
    "halves, norms": Shape(128, rotated=128, normed=True),
    "all of a large head": Shape(256, F16, F16, rotated=256, block_size=32),
    "neighbours, e4m3": Shape(96, F16, E4M3, rotated=64, interleaved=True),
    "part of a head, int8, norms of Gemma": Shape(80, BF16, INT8, rotated=32, block_size=64, normed=True, offset=1.0),
}


@dataclass
class Batch:
    """Arguments of one call, and a pool in which everything is NaN or 7 that was not written."""

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    rope: Rope | Angles | None
    norms: Norms | None
    pool: torch.Tensor  # [num_blocks, layers, 2, kv_heads, block_size, head_dim]; the cache is layer 1 of 3
    scales: torch.Tensor  # [num_blocks, layers, 2, kv_heads, block_size]

    @property
    def cache(self) -> LayerCache:
        keys, values = self.pool[:, 1].unbind(1)
        if self.shape.kv.itemsize > 1:
            return LayerCache(keys, values)
        return LayerCache(keys, values, *self.scales[:, 1].unbind(1))

    def run(self, device: EmulatedDevice) -> torch.Tensor:
        return KVWriter(device, self.shape.io).rotate_and_write(
            self.query, self.key, self.value, self.slots, self.cache, positions=self.positions, rope=self.rope, norms=self.norms
        )


def make(shape: Shape, *, num_blocks: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(shape.seed)
    size, dim = shape.block_size, shape.head_dim

    def one(heads: int, seed: int) -> torch.Tensor:
        return spaced(random(shape.num_tokens, heads, dim, seed=shape.seed + seed, dtype=shape.io))

    slots = torch.randperm(num_blocks * size, generator=generator)[: shape.num_tokens]
    slots[1::4] = -1
    rope = norms = None
    if shape.rotated:
        inverse = 10000.0 ** -(torch.arange(0, shape.rotated, 2).double() / shape.rotated)
        rope = Rope(*rope_table(inverse, LONGEST, 1.1), shape.interleaved)
    if shape.normed:
        norms = Norms(random(dim, seed=5, dtype=shape.io), random(dim, seed=6, dtype=shape.io), EPS, shape.offset)
    pool = torch.full((num_blocks, 3, 2, shape.kv_heads, size, dim), 7.0).to(shape.kv)
    return Batch(
        shape, one(shape.heads, 1), one(shape.kv_heads, 2), one(shape.kv_heads, 3), slots,
        torch.randint(0, LONGEST, (shape.num_tokens,), generator=generator), rope, norms,
        pool, torch.full(pool.shape[:-1], NAN),
    )  # fmt: skip  # a line a thought


def expected(batch: Batch, x: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Normed and rotated in the arithmetic of `dtype`, rounding after each step as models do."""
    shape = batch.shape
    x = x.to(dtype)
    if batch.norms is not None and weight is not None:
        wide = x.double() if dtype is torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        x = (normed * (weight.to(wide.dtype) + shape.offset)).to(dtype)
    if batch.rope is None:
        return x
    half = shape.rotated // 2
    cos, sin = (table[batch.positions, None].to(dtype) for table in (batch.rope.cos, batch.rope.sin))
    turning, rest = x[..., : shape.rotated], x[..., shape.rotated :]
    if shape.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def stored(batch: Batch) -> list[torch.Tensor]:
    """Keys and values in the slots that were written, in float64, [num_written, kv_heads, head_dim] each."""
    kept = batch.slots[batch.slots >= 0]
    block, offset = kept // batch.shape.block_size, kept % batch.shape.block_size
    parts = []
    for side in range(2):
        part = batch.pool.float()[block, 1, side, :, offset].double()
        if batch.shape.kv.itemsize == 1:
            part = part * batch.scales[block, 1, side, :, offset].double()[..., None]
        parts.append(part)
    return parts


def quantised(x: torch.Tensor, kv: torch.dtype) -> torch.Tensor:
    """torch's own: the largest number of a head becomes the largest of the dtype."""
    largest = 127.0 if kv is INT8 else 448.0
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    scaled = x.float() / scale
    rounded = scaled.round().clamp(-127, 127) if kv is INT8 else scaled.to(kv).float()
    return rounded.double() * scale.double()


def writes_exactly(device: EmulatedDevice, shape: Shape) -> None:
    batch = make(shape)
    before = batch.pool.clone()
    written = batch.slots >= 0
    assert written.any()
    assert not written.all()
    out = batch.run(device)
    weights = (None, None) if batch.norms is None else (batch.norms.query, batch.norms.key)

    def judge(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *, cached: bool) -> None:
        exact, by_torch = expected(batch, x, weight, torch.float64), expected(batch, x, weight, shape.io)
        if not cached:
            return as_exact_as_torch(ours, by_torch, exact)
        exact, by_torch = exact[written], by_torch[written]
        return as_exact_as_torch(ours, quantised(by_torch, shape.kv) if shape.kv.itemsize == 1 else by_torch, exact)

    judge(out, batch.query, weights[0], cached=False)
    keys, values = stored(batch)
    judge(keys, batch.key, weights[1], cached=True)
    exact = batch.value[written].double()
    if shape.kv.itemsize == 1:
        as_exact_as_torch(values, quantised(batch.value[written], shape.kv), exact)
    else:
        assert torch.equal(values, exact)
    # All else is as it was: other layers, other slots, and the scales of both.
    kept = batch.slots[written]
    block, offset = kept // shape.block_size, kept % shape.block_size
    batch.pool[block, 1, :, :, offset] = before[block, 1, :, :, offset]
    assert same_bits(batch.pool, before)
    if shape.kv.itemsize == 1:
        batch.scales[block, 1, :, :, offset] = NAN
    assert batch.scales.isnan().all()


@pytest.mark.parametrize("name", SHAPES)
def test_queries_keys_and_values_are_as_exact_as_torch(plain: EmulatedDevice, name: str) -> None:
    writes_exactly(plain, SHAPES[name])


def without_rope_keys_are_copied(device: EmulatedDevice) -> None:
    """The plain variant: what `AttentionBackend.attend` gives it, bit by bit; NaN too, and rows without slot may hold it."""
    batch = make(SHAPES["written as they are"])
    batch.key[batch.slots < 0] = NAN
    written = (batch.slots >= 0).nonzero()[0]
    batch.key[written, 0, 3] = NAN
    KVWriter(device, BF16).write(batch.key, batch.value, batch.slots, batch.cache)
    keys, values = stored(batch)
    kept = batch.slots >= 0
    assert torch.equal(keys.isnan(), batch.key[kept].isnan())
    assert torch.equal(keys.nan_to_num(), batch.key[kept].double().nan_to_num())
    assert torch.equal(values, batch.value[kept].double())


def test_keys_that_are_rotated_already_are_copied(plain: EmulatedDevice) -> None:
    without_rope_keys_are_copied(plain)


def turns_bit_by_bit_as_torch(device: EmulatedDevice, head_dim: int, dtype: torch.dtype) -> None:
    """One launch for the three that a model's own code makes: both sides turned by rotate.cu, then written."""
    batch = make(Shape(head_dim, dtype, dtype, heads=5, kv_heads=3))
    angles = [random(batch.shape.num_tokens, head_dim, seed=seed, dtype=dtype) for seed in (7, 8)]
    query, key = (x.transpose(0, 1)[None] for x in (batch.query, batch.key))
    turned = RowKernels(device, dtype).rotate(query, key, *(part[None] for part in angles))
    query, key = (x[0].transpose(0, 1) for x in turned)
    apart, before = make(batch.shape), batch.pool.clone()
    KVWriter(device, dtype).write(key, apart.value, apart.slots, apart.cache)
    assert not same_bits(apart.pool, before)
    assert same_bits(replace(batch, rope=Angles(*angles)).run(device), query)
    assert same_bits(batch.pool, apart.pool)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, BF16), (96, F16), (256, BF16)])
def test_angles_of_tokens_turn_bit_by_bit_as_torch(plain: EmulatedDevice, head_dim: int, dtype: torch.dtype) -> None:
    turns_bit_by_bit_as_torch(plain, head_dim, dtype)


def faults_reach_the_scale(device: EmulatedDevice) -> None:
    """A head with NaN or Inf cannot be stored in 8 bits; its scale says so. Zeros and tiny numbers are stored as zeros."""
    shape = SHAPES["part of a head, int8, norms of Gemma"]
    batch = replace(make(shape), slots=torch.arange(shape.num_tokens))
    batch.value[0, 0, 17], batch.value[1, 0, 70], batch.value[2, 0] = NAN, -torch.inf, 0.0
    batch.value[3, 0] = 1e-38
    batch.value[4, 0, 79] = 300.0
    batch.run(device)
    _, values = stored(batch)
    assert values[0, 0].isnan().all()
    assert values[1, 0].isnan().all()
    assert torch.isfinite(values[:, 1]).all()
    assert (values[2, 0] == 0).all()
    assert values[3, 0].abs().max() < 1e-37
    assert abs(values[4, 0, 79] - 300) < 1e-3
    assert batch.scales[4, 1, 1, 0].isnan().all()  # a block that nobody wrote to


def test_nan_and_inf_reach_the_scale(plain: EmulatedDevice) -> None:
    faults_reach_the_scale(plain)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch_in_any_schedule_gives_the_same_bits(plain: EmulatedDevice, data: st.DataObject) -> None:
    base = SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))]
    kv_heads = data.draw(st.integers(1, 3))
    shape = replace(
        base,
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 3)),
        block_size=data.draw(st.sampled_from([16, 32, 64])),
        num_tokens=data.draw(st.integers(0, 12)),
        seed=data.draw(st.integers(0, 2**20)),
    )
    results = []
    for device in in_every_schedule(plain):
        batch = make(shape)
        written = batch.slots >= 0
        results.append((batch.run(device)[written], batch.pool, batch.scales))
    for out, pool, scales in results[1:]:
        assert same_bits(out, results[0][0])
        assert same_bits(pool, results[0][1])
        assert same_bits(scales, results[0][2])


def kv_obeys(device: EmulatedDevice) -> None:
    for name in ("all of a large head", "part of a head, int8, norms of Gemma"):
        writes_exactly(device, SHAPES[name])
    turns_bit_by_bit_as_torch(device, 64, BF16)


def test_the_checked_build_finds_nothing(checked: EmulatedDevice) -> None:
    kv_obeys(checked)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
def test_scaled_tables_are_those_of_transformers(kind: str) -> None:
    """The kernel knows no kind of scaling: the table does."""
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.5] * 16, "long_factor": [3.0] * 16}
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters)
    inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=100)
    cos, sin = rope_table(inverse, 100, scaling)
    angles = torch.arange(100)[:, None].float() * inverse
    torch.testing.assert_close(cos, angles.cos() * scaling, atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, angles.sin() * scaling, atol=1e-5, rtol=0)


def _tables(width: int) -> Rope:
    return Rope(torch.zeros(LONGEST, width), torch.zeros(LONGEST, width))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": random(7, 3, 64)}, r"key has the shape \[7, 3, 64\]"),
        ({"key": random(7, 2, 64).half()}, "key is float16"),
        ({"value": random(7, 64, 2).transpose(1, 2)}, "the last dimension of value must be dense"),
        ({"value": torch.zeros(7, 2, 67, dtype=BF16)[..., 3:]}, "heads of value must begin at multiples of 4"),
        ({"slots": torch.zeros(7, dtype=torch.int32)}, "slots is int32"),
        ({"slots": torch.zeros(6, dtype=torch.int64)}, r"slots has the shape \[6\]"),
        ({"query": random(6, 6, 64)}, "query has the shape"),
        ({"rope": _tables(33)}, "rope.cos is 66"),
        ({"rope": _tables(34)}, "rope.cos is for 68 numbers"),
        ({"rope": _tables(32), "positions": None}, "positions must be given"),
        ({"rope": Angles(random(7, 64), random(7, 32))}, "rope.sin has the shape"),
        ({"rope": Angles(random(8, 64)[1:].clone().float(), random(7, 64))}, "rope.cos is float32"),
        ({"norms": Norms(random(64), random(32), EPS)}, "norms.key has the shape"),
    ],
)
def test_what_does_not_fit_is_named(plain: EmulatedDevice, change: dict[str, Any], says: str) -> None:
    batch = replace(make(SHAPES["written as they are"]), **change)
    before = batch.pool.clone()
    with pytest.raises(ValueError, match=says):
        batch.run(plain)
    assert same_bits(batch.pool, before)


def test_a_cache_that_does_not_fit_is_named() -> None:
    pool, scales = torch.zeros(2, 2, 2, 16, 64, dtype=INT8), torch.zeros(2, 2, 2, 16)
    keys, values = pool.unbind(1)
    with pytest.raises(ValueError, match="needs key_scales"):
        LayerCache(keys, values)
    with pytest.raises(ValueError, match="belong to caches of 8 bits"):
        LayerCache(keys.to(BF16), values.to(BF16), *scales.unbind(1))
    with pytest.raises(ValueError, match="strides"):
        LayerCache(keys, values.contiguous(), *scales.unbind(1))
    with pytest.raises(ValueError, match="key_scales has the shape"):
        LayerCache(keys, values, *torch.zeros(2, 2, 2, 8).unbind(1))
    with pytest.raises(ValueError, match="dtype is"):
        KVWriter(EmulatedDevice(), torch.float32)

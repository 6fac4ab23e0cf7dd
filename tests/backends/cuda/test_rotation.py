"""Rotary embedding in the launch that writes keys and values: the same bits as apart, in fewer launches, for any family."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamkv.attention import KVSpec, StepTensors
from streamkv.runner.deferred import Rotation, defer, pending
from streamkv.runner.hook import KVContext
from streamkv.runner.loader import load_model
from streamkv_backends.cuda.backend import CudaBackend
from streamkv_kernels.emulated import EmulatedDevice
from tests.backends.cuda.listening import Listening
from tests.runner.families import FAMILIES, MORE

LENGTHS = (9, 1, 4)
LAYERS = 2
BLOCKS = 4  # of a sequence
FUSED = ("Llama", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "Mixtral")
BETWEEN = ("Hunyuan dense", "Phi", "StableLM")
"""They norm what is rotated, or put it together with the half of a head that is not."""


class Apart(CudaBackend):
    """As a backend is that has no such launch."""

    rotate_and_attend: Any = None


@pytest.fixture(scope="module")
def device(libraries: Path) -> EmulatedDevice:
    return EmulatedDevice(cache=libraries)


def save(name: str, folder: Path) -> Path:
    """A tiny model of a family, with heads as wide as kernels want them."""
    config = (FAMILIES | MORE)[name].config()
    config.num_hidden_layers = LAYERS
    if hasattr(config, "layer_types") and config.layer_types is not None:
        config.layer_types = config.layer_types[:LAYERS]
    config.hidden_size, config.head_dim = 256, 64
    if name in ("Phi", "StableLM"):
        config.rope_parameters["partial_rotary_factor"] = 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def steps(folder: Path, backend: Any, listening: Listening) -> tuple[list[torch.Tensor], Counter[str]]:
    """Logits of a prefill and of two decodes; what the last one launched."""
    model = load_model(folder, dtype="float16", ops=backend.ops)
    backend.allocate_kv(KVSpec(BLOCKS * len(LENGTHS), 16, model.dtype, model.layers))
    context, found = KVContext(backend), []
    tables = torch.arange(BLOCKS * len(LENGTHS), dtype=torch.int32).view(len(LENGTHS), BLOCKS)
    done = [0] * len(LENGTHS)
    for counts in (LENGTHS, (1, 1, 1), (1, 1, 1)):
        positions = [torch.arange(start, start + count) for start, count in zip(done, counts, strict=True)]
        done = [start + count for start, count in zip(done, counts, strict=True)]
        slots = torch.cat([row * BLOCKS * 16 + part for row, part in enumerate(positions)])
        context.metadata = backend.prepare(
            StepTensors(torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(done, dtype=torch.int32), tables, slots)
        )
        listening.take()
        with torch.inference_mode():
            output = model.module(
                input_ids=(slots * 7 % 300)[None],
                position_ids=torch.cat(positions)[None],
                use_cache=False,
                streamkv_context=context,
            )
        found.append(output.logits[0])
    return found, Counter(launch.name for launch in listening.take())


def both(name: str, folder: Path, device: EmulatedDevice) -> tuple[Counter[str], Counter[str]]:
    """What a decode launches, fused and apart, where the numbers are the same."""
    save(name, folder)
    listening = Listening(device)
    fused, launches = steps(folder, CudaBackend("emulated", kernels=listening), listening)
    apart, plain = steps(folder, Apart("emulated", kernels=listening), listening)
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))
    return launches, plain


@pytest.mark.parametrize("name", FUSED)
def test_one_launch_rotates_and_writes(name: str, tmp_path: Path, device: EmulatedDevice) -> None:
    fused, apart = both(name, tmp_path, device)
    assert apart["rotate"] == 2 * LAYERS
    assert fused == apart - Counter(rotate=2 * LAYERS)


@pytest.mark.parametrize("name", BETWEEN)
def test_a_family_that_wants_the_numbers_before_gets_them(name: str, tmp_path: Path, device: EmulatedDevice) -> None:
    fused, apart = both(name, tmp_path, device)
    assert fused == apart
    assert apart["rotate"] == 2 * LAYERS
    kind = (FAMILIES | MORE)[name].model_type
    rotation = sys.modules[f"transformers.models.{kind}.modeling_{kind}"].apply_rotary_pos_emb
    assert not rotation._defers, "once is enough to learn it"


def test_whoever_wants_the_numbers_gets_them_computed_once() -> None:
    calls = []

    def rotate() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(0)
        return query + 1, key + 1

    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    rotation = Rotation(query, key, query, key, rotate)
    first, second = defer(rotation)
    assert pending(first, second) is rotation
    assert pending(second, first) is pending(first, key) is pending(first, defer(rotation)[1].clone()) is None
    calls.clear()
    rotation.done = None
    assert first.shape == query.shape
    assert first.dtype is query.dtype
    assert not calls, "looking at it is not using it"
    assert torch.equal(first * 2, 2 * torch.ones_like(query))
    assert type(first[0].transpose(0, 1)) is torch.Tensor
    first.mul_(3)
    assert float(torch.cat([first, second], dim=1).sum()) == 3 * query.numel() + key.numel()
    assert pending(first, second) is None
    assert len(calls) == 1


def test_an_address_is_that_of_numbers() -> None:
    """Kernels take it, with the strides that stood there before."""
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    parts = defer(Rotation(query, key, query, key, lambda: (query, key)))
    for part, source in zip(parts, (query, key), strict=True):
        strides, address = part.stride(), part.data_ptr()
        real = torch.empty(0).set_(part[0].untyped_storage())
        assert real.data_ptr() == address
        assert torch.equal(real.as_strided(source.shape, strides), source)

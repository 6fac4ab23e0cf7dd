"""A rewritten model against the untouched one: every family that is served, prompts and recorded decode steps, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from streamkv.attention import KVSpec
from streamkv.core.step import Step
from streamkv.runner.loader import load_model
from streamkv.runner.model_runner import ModelRunner
from streamkv.runner.packed_linear import pack_linear
from streamkv.runner.params import RowParams
from streamkv.runner.rewrite import rewrite
from streamkv.sampling_params import Sampling
from streamkv_backends.cpu.backend import CpuBackend
from streamkv_backends.torch_backend import TorchBackend
from tests.runner.families import FAMILIES, MORE, Family
from tests.runner.tiny import VOCAB, save_tiny

PROMPTS = (37, 5, 18)  # tokens
DECODES = 5
ALL = FAMILIES | MORE


class Listening(ModelRunner):
    """Keeps the logits of every step."""

    heard: list[torch.Tensor]

    def _finish(self, batch: Any, ranges: Any, logits: torch.Tensor) -> Any:
        self.heard.append(logits.float().clone())
        return super()._finish(batch, ranges, logits)


def logits(folder: Path, dtype: str, backend: Any, max_model_len: int | None = None) -> tuple[torch.Tensor, Listening, Any]:
    """[steps, sequences, vocab_size] of fixed tokens: the prompts in one step, then decodes, twice the same number of tokens."""
    model = load_model(folder, dtype=dtype, ops=backend.ops, max_model_len=max_model_len)
    pool = backend.allocate_kv(KVSpec(40, 16, model.dtype, model.layers))
    runner = Listening(model, backend, pool, max_num_seqs=len(PROMPTS), max_model_len=128)
    runner.heard = []
    tokens = torch.randint(VOCAB, (len(PROMPTS), 64), generator=torch.Generator().manual_seed(1)).tolist()
    done = [0] * len(PROMPTS)
    params = {row: RowParams(Sampling(max_tokens=9, temperature=0.0), 0, tokens[row], 64) for row in range(len(PROMPTS))}
    for index in range(1 + DECODES):
        step = Step(index, 0.0)
        for row, length in enumerate(PROMPTS):
            count = length if index == 0 else 1
            step.rows.append(row)
            step.starts.append(done[row])
            step.counts.append(count)
            step.samples.append(True)
            step.tokens.extend(tokens[row][done[row] : done[row] + count])
            if index == 0:
                step.admitted.append((row, str(row)))
                step.tables.append((row, 0, tuple(range(row * 8, row * 8 + 8))))
            done[row] += count
        runner.run(step, params)
    return torch.stack(runner.heard), runner, model


@pytest.mark.parametrize("name", ALL)
def test_as_exact_as_the_untouched_model(name: str, tmp_path: Path) -> None:
    family: Family = ALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(family.config()).save_pretrained(tmp_path)
    exact, *_ = logits(tmp_path, "float32", TorchBackend(), family.max_model_len)
    plain, *_ = logits(tmp_path, "bfloat16", TorchBackend(), family.max_model_len)
    fast, *_ = logits(tmp_path, "bfloat16", CpuBackend(), family.max_model_len)
    error, allowed = (fast - exact).abs(), (plain - exact).abs()
    assert error.mean() <= 1.5 * allowed.mean() + 1e-4
    assert error.max() <= 3 * allowed.max() + 1e-3


def test_a_llama_is_rewritten_whole_and_its_decode_steps_are_recorded(tmp_path: Path) -> None:
    _, runner, model = logits(save_tiny(tmp_path), "bfloat16", CpuBackend())
    kinds = {type(module).__name__ for module in model.module.modules()}
    assert not kinds & {"Linear", "LlamaRMSNorm"}
    recordings = runner._recordings
    assert recordings is not None
    assert recordings.off is None
    assert recordings.sizes == [(3, 3)]


def test_a_model_that_reads_what_it_computes_is_not_recorded(tmp_path: Path) -> None:
    """JetMoE splits its tokens by the router's counts, which it takes to Python as a list."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(ALL["JetMoE"].config()).save_pretrained(tmp_path)
    _, runner, _ = logits(tmp_path, "bfloat16", CpuBackend())
    assert runner._recordings is not None
    assert runner._recordings.off == "the model's Python reads what it computes"


def test_in_float32_nothing_but_attention_is_ours(tmp_path: Path) -> None:
    _, runner, model = logits(save_tiny(tmp_path), "float32", CpuBackend())
    assert runner._recordings is not None
    assert runner._recordings.sizes == []
    assert "LlamaRMSNorm" in {type(module).__name__ for module in model.module.modules()}


# -- what only looks like it --------------------------------------------------------------------------------------------


class HalvedNorm(nn.Module):
    """Has all that a norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float() / 2).to(x.dtype)


class GatedLike(nn.Module):
    """Has the parts of a gated MLP; what it does with them is up to `twist`."""

    def __init__(self, twist: float, act: Any = nn.functional.silu) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
        self.up_proj = nn.Linear(32, 64, dtype=torch.bfloat16)
        self.down_proj = nn.Linear(64, 32, dtype=torch.bfloat16)
        self._twist, self._act = twist, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x) * self._twist)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> None:
        return None


def rewritten(inner: nn.Module) -> tuple[Holder, dict[str, int]]:
    holder = Holder(inner).requires_grad_(False)
    return holder, dict(rewrite(holder, CpuBackend().ops, pack_linear))


@torch.inference_mode()
def test_a_norm_that_does_more_stays() -> None:
    norm = HalvedNorm()
    holder, done = rewritten(norm)
    assert holder.inner is norm
    assert not done.get("norm")


@pytest.mark.parametrize(
    ("mlp", "fused"),
    [
        (GatedLike(1.0), True),
        (GatedLike(1.0, lambda x: nn.functional.gelu(x, approximate="tanh")), True),
        (GatedLike(1.0, nn.functional.relu), False),
        (GatedLike(0.5), False),
    ],
    ids=["silu", "gelu", "relu", "twisted"],
)
@torch.inference_mode()
def test_a_gated_mlp_is_fused_only_if_it_is_one(mlp: GatedLike, fused: bool) -> None:
    given = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = mlp(given)
    holder, done = rewritten(mlp)
    assert done.get("gate", 0) == fused
    assert done["merged"] == 1
    assert (holder.inner(given) - wanted).abs().max() <= 0.02 * wanted.abs().max()


class AsksTwice(nn.Module):
    """Reads its projections in an odd order, of different inputs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(32, 16, bias=name == "k_proj", dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x + 1
        return torch.cat([self.v_proj(x), self.k_proj(other), self.q_proj(x), self.k_proj(x), self.v_proj(other)], dim=-1)


@torch.inference_mode()
def test_merged_layers_answer_each_in_any_order() -> None:
    module = AsksTwice()
    given = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = module(given)
    holder, done = rewritten(module)
    assert done["merged"] == 1
    assert (holder.inner(given) - wanted).abs().max() <= 0.02 * wanted.abs().max()

"""Every family with a parity test, as a tiny configuration; docs/models.md is generated from these tables.

Windows are shorter than most prompts and divided by no block size; layers alternate where the family's do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.runner.tiny import VOCAB

MAX_TOKENS = 10
WINDOW = 23

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}
_GATED: dict[str, Any] = {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LLAMA: dict[str, Any] = {**_GATED}
_ORIGINAL = 40  # tokens, where longrope changes its table


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def _longrope(pairs: int) -> dict[str, Any]:
    return _rope(
        "longrope",
        factor=4.0,
        short_factor=[1.0 + 0.1 * i for i in range(pairs)],
        long_factor=[1.5 + 0.5 * i for i in range(pairs)],
        original_max_position_embeddings=_ORIGINAL,
    )


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        model_type: transformers' name of the configuration.
        settings: what differs from the common ones.
        shows: what this case is there for.
        lengths: of prompts; None = the usual ones.
        max_model_len: of the engine.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    lengths: tuple[int, ...] | None = None
    max_model_len: int | None = None

    def config(self) -> Any:
        """The configuration."""
        return AutoConfig.for_model(self.model_type, **(COMMON | self.settings))


LONG = (41, 44, 55, 60, 71, 90, 93)
SHORT = (1, 2, 9, 12, 17, 25, 29)

FAMILIES: dict[str, Family] = {
    "Llama": Family("llama", _LLAMA, "grouped heads"),
    "Llama, rope linear": Family("llama", _LLAMA | _rope("linear", factor=2.0), "rope type linear"),
    "Llama, rope llama3": Family(
        "llama",
        _LLAMA | _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        "rope type llama3",
    ),
    "Llama, rope yarn": Family(
        "llama", _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=64), "rope type yarn"
    ),
    "Llama, rope dynamic": Family("llama", _LLAMA | _rope("dynamic", factor=2.0), "rope type dynamic"),
    "Llama, rope longrope": Family(
        "llama", _LLAMA | _longrope(8), "rope type longrope, prompts beyond the original length", lengths=LONG
    ),
    "Llama, rope longrope, short": Family(
        "llama",
        _LLAMA | _longrope(8),
        "rope type longrope, max_model_len = the original length",
        lengths=SHORT,
        max_model_len=_ORIGINAL,
    ),
    "Mistral": Family("mistral", _GATED | {"sliding_window": WINDOW}, "sliding window in every layer"),
    "Qwen2": Family("qwen2", {k: v for k, v in _GATED.items() if k != "head_dim"}, "biases on q, k, v"),
    "Qwen2, sliding": Family(
        "qwen2",
        {k: v for k, v in _GATED.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "sliding window in the upper layers",
    ),
    "Qwen3": Family("qwen3", _GATED, "norms on q and k"),
    "Gemma": Family("gemma", _GATED | {"num_key_value_heads": 1}, "one KV head, scaled embeddings"),
    "Gemma 2": Family(
        "gemma2",
        _GATED | _SLIDING | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
        "soft-capped scores and logits, every other layer sliding, its own scale",
    ),
    "Gemma 3": Family(
        "gemma3_text",
        _GATED
        | _SLIDING
        | {
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
        "sliding and full layers with two rope bases",
    ),
    "Gemma 3, longrope": Family(
        "gemma3_text",
        _GATED
        | _SLIDING
        | {
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": _longrope(8)["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
        "rope type longrope in one type of layer",
        lengths=LONG,
    ),
    "Phi-3": Family("phi3", _GATED | {"sliding_window": WINDOW}, "fused projections, sliding window"),
    "Phi-3, longrope": Family(
        "phi3",
        _GATED | {"original_max_position_embeddings": _ORIGINAL} | _longrope(8),
        "rope type longrope beyond the original length",
        lengths=LONG,
    ),
    "Phi-3, partial longrope, short": Family(
        "phi3",
        _GATED
        | {"original_max_position_embeddings": _ORIGINAL}
        | {"rope_parameters": {**_longrope(6)["rope_parameters"], "partial_rotary_factor": 0.75}},
        "rope over a part of each head, max_model_len = the original length",
        lengths=SHORT,
        max_model_len=_ORIGINAL,
    ),
    "GPT-2": Family("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "learned positions, one scale per layer"),
    "GPT-J": Family("gptj", {"rotary_dim": 8}, "older than the attention interface"),
    "GPT-NeoX": Family("gpt_neox", {"intermediate_size": 96}, "partial rope, parallel residual"),
    "OPT": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}, "learned positions with an offset, projected embeddings"),
    "OLMo 2": Family("olmo2", _GATED, "norms after each block and on q and k"),
    "Granite": Family(
        "granite",
        _GATED | {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
        "multipliers on embeddings, scores, residuals and logits",
    ),
    "Cohere 2": Family("cohere2", _GATED | _SLIDING, "rope in sliding layers only, parallel block"),
    "StarCoder 2": Family("starcoder2", _GATED | {"sliding_window": WINDOW}, "sliding window, biases"),
    "GLM-4": Family("glm4", _GATED, "partial rope, norms on both sides"),
    "Mixtral": Family("mixtral", _GATED | {"num_local_experts": 4, "sliding_window": WINDOW}, "experts, sliding window"),
    "Qwen3-MoE": Family("qwen3_moe", _GATED | _EXPERTS | {"num_experts": 4}, "experts, norms on q and k"),
    "GPT-OSS": Family("gpt_oss", _GATED | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}, "sinks, sliding window"),
}
"""What is promised; each is run alone, batched, chunked, cold, warm and preempted."""

MORE: dict[str, Family] = {
    "AFMoE": Family("afmoe", _GATED | _SLIDING | _EXPERTS | {"num_experts": 4, "num_dense_layers": 1}),
    "Apertus": Family("apertus", _GATED),
    "Arcee": Family("arcee", _GATED),
    "Aria (text)": Family("aria_text", _GATED | {"moe_num_experts": 4, "moe_topk": 2}),
    "BioGPT": Family("biogpt", {"intermediate_size": 96}),
    "BitNet": Family("bitnet", _GATED),
    "CodeGen": Family("codegen", {"rotary_dim": 8, "n_ctx": 256}),
    "Cohere": Family("cohere", _GATED | {"use_qk_norm": True}),
    "Cohere 2 MoE": Family("cohere2_moe", _GATED | _SLIDING | _EXPERTS | {"num_experts": 4}),
    "CTRL": Family("ctrl", {"dff": 96, "n_positions": 256}),
    "CWM": Family("cwm", _GATED | _SLIDING | {"bos_token_id": 1, "eos_token_id": 299, "pad_token_id": 0}),
    "dots.llm1": Family(
        "dots1",
        _GATED
        | _EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ERNIE 4.5": Family("ernie4_5", _GATED),
    "ERNIE 4.5 MoE": Family("ernie4_5_moe", _GATED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "EXAONE 4": Family("exaone4", _GATED | _SLIDING),
    "EXAONE MoE": Family("exaone_moe", _GATED | _SLIDING | _EXPERTS | {"num_experts": 4, "first_k_dense_replace": 1}),
    "FlexOlmo": Family("flex_olmo", _GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 4 (text)": Family(
        "gemma4_text", _GATED | _SLIDING | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    ),
    "GLM": Family("glm", _GATED),
    "GLM-4 MoE": Family("glm4_moe", _GATED | _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}),
    "GPTBigCode": Family("gpt_bigcode", {"multi_query": True}),
    "GPT-NeoX Japanese": Family("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "Granite SWA": Family("granite_swa", _GATED | _SLIDING),
    "Granite MoE": Family("granitemoe", _GATED | {"num_local_experts": 4}),
    "Granite MoE, shared": Family("granitemoeshared", _GATED | {"num_local_experts": 4, "shared_intermediate_size": 32}),
    "Granite MoE SWA": Family("granitemoe_swa", _GATED | _SLIDING | {"num_local_experts": 4}),
    "Helium": Family("helium", _GATED),
    "Hunyuan dense": Family("hunyuan_v1_dense", _GATED),
    "Hunyuan MoE": Family("hunyuan_v1_moe", _GATED | {"num_experts": 4, "moe_topk": 2}),
    "HyperCLOVA X": Family("hyperclovax", _GATED | {"attention_multiplier": 0.1}),
    "InternLM 3": Family("internlm3", _GATED),
    "Jais 2": Family("jais2", _GATED),
    "JetMoE": Family("jetmoe", {"intermediate_size": 96, "num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4}),
    "MiMo-V2-Flash": Family("mimo_v2_flash", _GATED | _SLIDING | _EXPERTS | {"v_head_dim": 16, "n_routed_experts": 4}),
    "MiniMax M2": Family("minimax_m2", _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "Ministral": Family("ministral", _GATED | _SLIDING),
    "Ministral 3": Family(
        "ministral3",
        _GATED
        | _rope("yarn", factor=4.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.3, max_position_embeddings=256),
    ),
    "NanoChat": Family("nanochat", _GATED),
    "Nemotron": Family("nemotron", _GATED),
    "OLMo": Family("olmo", _GATED | {"clip_qkv": 3.0}),
    "OLMo 3": Family("olmo3", _GATED | _SLIDING),
    "OLMoE": Family("olmoe", _GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Persimmon": Family("persimmon", {"intermediate_size": 96}),
    "Phi": Family("phi", _GATED | {"qk_layernorm": True}),
    "PhiMoE": Family("phimoe", _GATED | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "Qwen2-MoE": Family(
        "qwen2_moe",
        _GATED | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "Seed-OSS": Family("seed_oss", _GATED),
    "SmolLM 3": Family("smollm3", _GATED | {"no_rope_layers": [1, 0, 1]}),
    "Solar Open": Family("solar_open", _GATED | _EXPERTS | {"n_routed_experts": 4}),
    "StableLM": Family("stablelm", _GATED | {"qk_layernorm": True, "use_parallel_residual": True}),
    "VaultGemma": Family("vaultgemma", _GATED | _SLIDING | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
}
"""Served because nothing speaks against it; no line of code here knows them. Run batched, chunked, cold and warm."""


@dataclass(frozen=True)
class TinyModel:
    """A family's model on disk, and what transformers says to the prompts."""

    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]


def make_prompts(lengths: tuple[int, ...] | None) -> list[list[int]]:
    """More prompts than rows; three share a beginning that ends inside a block."""
    source = random.Random(7)
    if lengths is None:
        lengths = (1, 2, 16, 33, 47, 70)
    own = [[source.randrange(VOCAB) for _ in range(length)] for length in lengths]
    base = own[-1]
    return [*own, [*base[:-8], 5, 6, 7], [*base[:-3], 9]]


def spread_weights(model: Any, seed: int) -> None:
    """Random weights everywhere, biases, norms and sinks included, large enough that outputs vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.1)


def build(family: Family, folder: Path) -> TinyModel:
    """Write the model as safetensors and ask `transformers.generate`, one prompt at a time, with its eager attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32, attn_implementation="eager").eval()
    spread_weights(model, 1)
    model.generation_config.eos_token_id = None  # every answer has its full length
    model.save_pretrained(folder)
    prompts = make_prompts(family.lengths)
    return TinyModel(folder, prompts, [greedy(model, prompt) for prompt in prompts])


def greedy(model: Any, prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    """What `generate` says."""
    ids = torch.tensor([prompt])
    # An explicit mask: without it `generate` takes prompt tokens that equal the pad id for padding.
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens

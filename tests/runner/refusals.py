"""Models that are refused, one or more for each thing the hook needs; docs/models.md prints what is said to them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from streamkv.errors import ModelLoadError
from streamkv.runner.architecture import check_architecture, max_positions

BY_CONFIG: dict[str, tuple[str, dict[str, Any], str]] = {
    # architecture: (model type, settings, need in arch_needs.NEEDS)
    "T5ForConditionalGeneration": ("t5", {}, "decoder_only"),
    "BartForCausalLM": ("bart", {}, "decoder_only"),
    "BertForMaskedLM": ("bert", {}, "class"),
    "ViTForImageClassification": ("vit", {}, "class"),
    "LlamaForSequenceClassification": ("llama", {}, "class"),
    "Gemma3ForConditionalGeneration": ("gemma3", {}, "text"),
    "MambaForCausalLM": ("mamba", {}, "stateless"),
    "JambaForCausalLM": ("jamba", {}, "stateless"),
    "Qwen3NextForCausalLM": ("qwen3_next", {}, "stateless"),
    "RwkvForCausalLM": ("rwkv", {}, "stateless"),
    "Llama4ForCausalLM": ("llama4_text", {}, "layer_types"),
    "Gemma3nForCausalLM": ("gemma3n_text", {}, "own_kv"),
    "BloomForCausalLM": ("bloom", {}, "no_alibi"),
    "MptForCausalLM": ("mpt", {}, "no_alibi"),
    "FalconForCausalLM": ("falcon", {"alibi": True}, "no_alibi"),
    "XGLMForCausalLM": ("xglm", {}, "interface"),
    "XLNetLMHeadModel": ("xlnet", {}, "interface"),
}
"""Refused before any weight is read."""

_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
}

BY_PROBE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # architecture: (model type, settings beside families.COMMON, need, the same in words)
    "BertLMHeadModel": ("bert", {"intermediate_size": 96, "pad_token_id": 0}, "mask", "an encoder, unless `is_decoder` is set"),
    "DeepseekV3ForCausalLM": ("deepseek_v3", _MLA, "width", "keys are wider than values (latent attention)"),
    "DiffLlamaForCausalLM": ("diffllama", {"intermediate_size": 96}, "layers", "each layer attends twice"),
    "GPTNeoForCausalLM": (
        "gpt_neo",
        {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 23},
        "layers",
        "its attention layers are not numbered",
    ),
    "PhimoeForCausalLM": (
        "phimoe",
        {
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 40,
                "short_mscale": 1.1,
                "long_mscale": 1.4,
            },
        },
        "isolated",
        "with rope type `longrope`, whose scale here follows the longest sequence of a batch",
    ),
}
"""Refused by the probe of the loaded module."""


def sentence_of(architecture: str) -> str:
    """What is said to a model that is refused by its configuration."""
    model_type, settings, _ = BY_CONFIG[architecture]
    config = AutoConfig.for_model(model_type, **settings, architectures=[architecture])
    try:
        check_architecture(config)
        max_positions(config)
    except ModelLoadError as error:
        return error.message
    raise AssertionError(f"{architecture} is not refused")

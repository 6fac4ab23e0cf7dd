"""Which keys and numbers of a folder's JSON files are refused before transformers sees any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from streamkv.errors import ModelLoadError
from streamkv.runner.bounded_json import walk

__all__ = ["BOUNDS", "FORBIDDEN_KEYS", "LAYER_COUNTS", "check_bounds", "check_keys", "check_tokenizer"]

FORBIDDEN_KEYS: Final = {
    "auto_map": "names Python code",
    "trust_remote_code": "overrules the caller's refusal of code",
    "custom_pipelines": "names Python code",
    "custom_generate": "names Python code",
    "_attn_implementation": "chooses kernels, which may be downloaded and run",
    "attn_implementation": "chooses kernels, which may be downloaded and run",
    "_experts_implementation": "chooses kernels, which may be downloaded and run",
    "experts_implementation": "chooses kernels, which may be downloaded and run",
    "use_kernels": "downloads and runs kernels",
    "kernel_config": "downloads and runs kernels",
    "fusion_config": "rewrites the model's classes",
    "distributed_config": "is not the model's to choose",
    "configuration_files": "names another configuration to be read",
    "transformers_weights": "names other weights to be read",
}
"""Prefix of a key -> what it would do, at any depth of any JSON file."""

_HARMLESS: Final = {"_attn_implementation_autoset"}
"""A flag that transformers 4.46 to 4.52 wrote into every configuration."""

_QUANTIZED: Final = ("quantization_config", "compression_config")

LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_WIDTH, _LAYERS, _HEADS, _EXPERTS = (1, 2**18), (1, 1024), (1, 4096), (0, 4096)
_TOKENS, _VOCABULARY, _TOKEN_ID = (1, 2**24), (1, 2**22), (-1, 2**22)

BOUNDS: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "kv_lora_rank", "q_lora_rank"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), (1, 2**21)),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), (0, 2**21)),
    **dict.fromkeys(LAYER_COUNTS, _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim", "qk_rope_head_dim", "rotary_dim"), _HEADS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"), _EXPERTS
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _TOKENS),
    **dict.fromkeys(("original_max_position_embeddings",), _TOKENS),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), (0, 2**31)),
    **dict.fromkeys(("vocab_size",), _VOCABULARY),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), _TOKEN_ID),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), (1e-3, 1e12)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), (0.0, 1.0)),
}
"""Key -> least and most; far beyond any model, and far below what would exhaust a machine before the weights are compared."""

_FRACTIONAL: Final = {key for key, (low, _) in BOUNDS.items() if isinstance(low, float)}

_MAX_PATTERN: Final = 4096  # characters of a regular expression or a replaced text in a tokenizer
_MAX_PARTS: Final = 4096  # values in one of a tokenizer's stages
_MAX_ADDED: Final = 200_000


def check_keys(value: Mapping[str, Any], what: object) -> None:
    """Refuse code, redirections and quantised weights, at any depth.

    Raises:
        ModelLoadError: one sentence that names the key.
    """
    for key, inner in walk(value, what):
        # None is what a saved configuration holds for everything that was not chosen.
        if inner is None or key in _HARMLESS:
            continue
        for forbidden, reason in FORBIDDEN_KEYS.items():
            if key.startswith(forbidden):
                raise ModelLoadError(
                    f"{what} sets {key[:100]!r}, which {reason}; StreamKV runs no code named by a model folder. "
                    "If transformers knows the architecture itself, remove the key"
                )
        if key in _QUANTIZED:
            method = str(inner.get("quant_method", "unnamed"))[:40] if isinstance(inner, dict) else "unnamed"
            raise ModelLoadError(f"{what} says that the weights are quantised ({method}); take the model's unquantised weights")


def check_bounds(config: Mapping[str, Any], what: object) -> None:
    """Refuse numbers that no model has.

    Raises:
        ModelLoadError: one sentence that names the key and its bounds.
    """
    for key, value in walk(config, what):
        if key in BOUNDS and value is not None:
            for each in value if isinstance(value, list) else [value]:  # per layer in some families; several ending tokens
                _check_number(key, each, what)


def _check_number(key: str, value: object, what: object) -> None:
    low, high = BOUNDS[key]
    kinds = (int, float) if key in _FRACTIONAL else (int,)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        number = "a number" if key in _FRACTIONAL else "an integer"
        raise ModelLoadError(f"{what} sets {key} to {str(value)[:40]!r}; it must be {number} from {low:g} to {high:g}")


def check_tokenizer(tokenizer: Mapping[str, Any], what: object) -> None:
    """Refuse a tokenizer.json whose stages are larger than any tokenizer's.

    Sizes only: whether a regular expression backtracks without end cannot be read off it. The library's own engine gives
    up after ten million retries in a match.

    Raises:
        ModelLoadError: one sentence that names the stage.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise ModelLoadError(f"{what} has no model")
    vocabulary = model.get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if not all(type(token) is int and 0 <= token < 2**22 for token in ids):
        raise ModelLoadError(f"{what} has a token id that is no integer from 0 to {2**22 - 1}")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MAX_ADDED:
        raise ModelLoadError(f"{what} adds more than {_MAX_ADDED} tokens to its vocabulary, or something that is no list")
    for stage in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_stage(tokenizer.get(stage), f"the {stage} of {what}")


def _check_stage(stage: object, what: str) -> None:
    parts = 0
    for key, value in walk(stage, what):
        parts += 1
        if isinstance(value, str) and len(value) > _MAX_PATTERN and key != "precompiled_charsmap":
            raise ModelLoadError(f"{what} has a pattern of {len(value)} characters; at most {_MAX_PATTERN} are read")
    if parts > _MAX_PARTS:
        raise ModelLoadError(f"{what} has {parts} parts; at most {_MAX_PARTS} are read")

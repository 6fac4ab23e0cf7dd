"""Tiny Llamas for tests: untied, spread-out random weights, so that outputs vary from token to token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.text.kinds import CHATML, raw

VOCAB = 300

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}


def tiny_config(rope: str = "default", **changes: Any) -> LlamaConfig:
    """A three-layer Llama with grouped KV heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": ROPES[rope],
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "dtype": "float32",
    }
    return LlamaConfig(**(settings | changes))


def save_tiny(folder: Path, rope: str = "default", **changes: Any) -> Path:
    """Write a tiny model as safetensors; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(rope, **changes))
    model.save_pretrained(folder)
    return folder


def save_talking(folder: Path) -> Path:
    """Write a tiny model with 512 logits, a byte-level tokenizer of fewer ids and a ChatML template."""
    save_tiny(folder, vocab_size=512)
    raw("byte_level").save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def generate(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy continuation by `transformers.generate`, alone."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    # An explicit mask: without it `generate` takes prompt tokens that equal the pad id for padding.
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens

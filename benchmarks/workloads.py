"""The model and the workloads of what is compared, all from seeds.

The model is a Llama of 254M parameters with random bfloat16 weights; speed does not depend on their values, and nothing has
to be downloaded. The workloads hold token ids, so no tokenizer has a part in the figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["DEFAULT_MODEL_DIR", "WORKLOADS", "Job", "build_model", "jobs", "make_config", "make_tokenizer"]

DEFAULT_MODEL_DIR: Final = Path.home() / ".cache" / "streamkv-benchmarks"

_MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama-254m": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    },
    # Float32 and large weights: every engine must give the same tokens, so `--quick` checks the benchmark itself.
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "dtype": "float32",
        "initializer_range": 0.3,
    },
}


@dataclass(frozen=True)
class Job:
    """One request: generate exactly `max_tokens` tokens, greedily."""

    prompt: list[int]
    max_tokens: int


def _single(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
    """One request at a time is what a single user feels."""
    return [Job(token(128 // scale), 128 // scale)]


def _mixed32(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
    """Lengths that differ: static batches wait for the longest row."""
    return [Job(token(source.randint(16, 512 // scale)), source.randint(16, 256 // scale)) for _ in range(32)]


def _prefix32(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
    """A long system prompt that nobody has computed yet when all requests arrive together."""
    shared = token(1024 // scale)
    return [Job(shared + token(32), 32) for _ in range(32)]


def _prefill512(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
    """What a prompt costs, without a word of answer."""
    return [Job(token(512 // scale), 1)]


def _decode(streams: int) -> Callable[..., list[Job]]:
    """Long enough that all streams decode together for a while, whoever's prompt was computed first."""

    def shape(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
        return [Job(token(300 // scale), 64) for _ in range(streams)]

    return shape


def _long8(source: random.Random, token: Callable[[int], list[int]], scale: int) -> list[Job]:
    """Twice as many bytes of KV as of weights in every step."""
    return [Job(token(3500 // scale), 96) for _ in range(8)]


WORKLOADS: Final[dict[str, tuple[str, Callable[..., list[Job]]]]] = {
    "single": ("1 request, prompt 128, output 128", _single),
    "mixed32": ("32 at once, prompts 16–512, outputs 16–256, uniform", _mixed32),
    "prefix32": ("32 at once, shared prefix of 1,024 tokens and 32 own, output 32", _prefix32),
    "prefill512": ("1 prompt of 512 tokens, 1 token of output", _prefill512),
    "decode8": ("8 streams that decode together, context 300", _decode(8)),
    "decode32": ("32 streams that decode together, context 300", _decode(32)),
    "long8": ("8 streams that decode together, context 3,500", _long8),
}


def jobs(workload: str, seed: int, *, vocab_size: int, scale: int = 1) -> list[Job]:
    """The requests of one repetition. Lengths are the same for every seed, token ids are not.

    Args:
        scale: divides lengths, for a quick look.
    """
    ids = random.Random(f"{workload} {seed}")

    def token(count: int) -> list[int]:
        return [ids.randrange(3, vocab_size) for _ in range(count)]

    return WORKLOADS[workload][1](random.Random(workload), token, scale)


def build_model(folder: Path, *, tiny: bool = False) -> Path:
    """Write the model as safetensors, unless it is there already; returns its folder."""
    name = "llama-tiny" if tiny else "llama-254m"
    target = folder / name
    if (target / "tokenizer.json").is_file():  # written last
        return target
    import torch
    from transformers import LlamaForCausalLM

    settings = _MODELS[name]
    config = make_config(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, settings["dtype"]))
    model.save_pretrained(target)
    (target / "tokenizer.json").write_text(make_tokenizer(settings["vocab_size"]).to_str(), encoding="utf-8")
    return target


def make_config(**settings: Any) -> Any:
    """A `LlamaConfig` without an end-of-sequence token: every request runs to its full length everywhere."""
    from transformers import LlamaConfig

    return LlamaConfig(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)


def make_tokenizer(vocab_size: int) -> Any:
    """A byte-level `tokenizers.Tokenizer` whose other tokens are made-up words, so that StreamKV has text to produce."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġw{index}" for index in range(vocab_size - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

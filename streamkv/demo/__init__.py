"""The model in the box: a small Llama that StreamKV serves when it is given no other.

This package must stay cheap to import: the server asks it only where the weights lie. The corpus
generator, the trainer and the evaluation are separate modules that import torch themselves.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder that holds ``config.json``, the tokenizer and ``model.safetensors``."""
    return Path(__file__).resolve().parent / "model"

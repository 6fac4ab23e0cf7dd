"""The model as transformers runs it."""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def load(options: dict[str, Any]) -> Any:
    """A model in evaluation mode. Options: `folder`, `dtype`, `threads`."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    return LlamaForCausalLM.from_pretrained(options["folder"], dtype=dtype, attn_implementation="sdpa").eval()

"""StreamKV: many token streams on one WebSocket, over a paged KV cache that shares prefixes.

Importing this package is cheap: what needs torch is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamkv.async_engine import Engine
    from streamkv.llm import LLM
    from streamkv.outputs import CompletionOutput, EmbeddingOutput, RequestOutput, ScoreOutput
    from streamkv.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "Engine",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "streamkv.llm",
    "Engine": "streamkv.async_engine",
    "RequestOutput": "streamkv.outputs",
    "CompletionOutput": "streamkv.outputs",
    "EmbeddingOutput": "streamkv.outputs",
    "ScoreOutput": "streamkv.outputs",
    "SamplingParams": "streamkv.sampling_params",
}


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'streamkv' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)

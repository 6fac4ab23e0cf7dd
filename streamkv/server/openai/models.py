"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from streamkv.engine.api import EngineInfo
from streamkv.errors import ModelNotFoundError
from streamkv.server.openai.shapes import Model, ModelList

__all__ = ["model", "models"]


def models(info: EngineInfo, created: int) -> ModelList:
    """All models."""
    return ModelList([Model(info.model, created, info.max_model_len)])


def model(info: EngineInfo, created: int, name: str) -> Model:
    """One model.

    Raises:
        ModelNotFoundError: another one is served.
    """
    if name != info.model:
        raise ModelNotFoundError(f"this server serves {info.model}", param="model")
    return Model(info.model, created, info.max_model_len)

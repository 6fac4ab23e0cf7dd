"""The one place where transformers' attention becomes ours.

transformers calls the function registered under an attention implementation's name from every attention layer, with queries and
keys already rotated. Ours writes k and v into the paged pool and attends over blocks; the mask function says "no mask",
because the backend knows who may see whom. The packed batch is [1, num_tokens] with explicit positions.

What a forward pass runs with (`streamkv_context=`) does not travel through the model: not every family hands unknown arguments
down to its layers. It is set aside before the model sees its arguments and forgotten when the pass has ended.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from streamkv.attention import AttentionBackend, Rotator
from streamkv.runner.deferred import pending

__all__ = [
    "HOOK_NAME",
    "AttentionContext",
    "KVContext",
    "Probe",
    "attach",
    "attend_by",
    "current_context",
    "register",
    "uses_interface",
]

HOOK_NAME: Final = "streamkv"


class AttentionContext(Protocol):
    """What the attention layers of one forward pass run with."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[1, heads, num_tokens, head_dim] in, [1, num_tokens, heads, head_dim] out."""

    def mask(self, **kwargs: Any) -> torch.Tensor | None:
        """What transformers hands its layers as attention mask; arguments as for a function of AttentionMaskInterface."""


_CONTEXT: Final[ContextVar[AttentionContext | None]] = ContextVar("streamkv_context", default=None)


@dataclass(slots=True)
class KVContext:
    """Attends over the paged pool. Owner: the runner, which sets `metadata` once a step.

    Attributes:
        rotator: the backend, if it can rotate too.
    """

    backend: AttentionBackend
    metadata: Any = None
    rotator: Rotator | None = field(init=False)

    def __post_init__(self) -> None:
        """Look what the backend can do, once."""
        self.rotator = self.backend if isinstance(self.backend, Rotator) else None

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[1, heads, num_tokens, head_dim] in, [1, num_tokens, heads, head_dim] out."""
        assert attention_mask is None, "a mask was built although the hook asks for none"
        layer: Any = module.layer_idx  # every attention module of transformers has it
        step = (layer, self.metadata, kwargs.get("s_aux"))
        rotation = pending(query, key)
        if rotation is None or self.rotator is None:
            return self.backend.attend(_rows(query), _rows(key), _rows(value), *step)[None]
        rows = (_rows(rotation.query), _rows(rotation.key), _rows(value))
        return self.rotator.rotate_and_attend(*rows, rotation.cos[0], rotation.sin[0], *step)[None]

    def mask(self, **_kwargs: Any) -> None:
        """No mask: the backend knows who sees whom."""


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[1, heads, num_tokens, head_dim] -> [num_tokens, heads, head_dim]."""
    return heads[0].transpose(0, 1)


class Probe:
    """Stands in for a KVContext where only the rest of the model is looked at: each token attends to itself."""

    def attend(
        self,
        _module: torch.nn.Module,
        query: torch.Tensor,
        _key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Every token's own value."""
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)

    def mask(self, **_kwargs: Any) -> None:
        """No mask."""


def register() -> None:
    """Make `attn_implementation=HOOK_NAME` known to transformers. Idempotent."""
    AttentionInterface.register(HOOK_NAME, _attention)
    AttentionMaskInterface.register(HOOK_NAME, _mask)


def attach(module: Any) -> None:
    """Make `module(..., streamkv_context=context)` attend through `context`; called once, after its weights are in place."""
    attend_by(module, HOOK_NAME)
    module.register_forward_pre_hook(_enter, with_kwargs=True)
    module.register_forward_hook(_leave, always_call=True)
    for layer in module.modules():
        if callable(getattr(layer, "_attn", None)) and not uses_interface(type(layer)):
            layer._attn = _OwnAttention(layer)  # noqa: SLF001  # the only place where such a layer can be entered


def attend_by(module: Any, implementation: str) -> None:
    """Choose an attention implementation by name for every layer; also for families that transformers cannot switch itself."""
    configs = {
        id(layer.config): layer.config
        for layer in module.modules()
        if isinstance(getattr(layer, "config", None), PretrainedConfig)
    }
    for config in configs.values():
        config._attn_implementation = implementation  # noqa: SLF001  # the public setter asks the class, and GPT-J's says no


def uses_interface(cls: type) -> bool:
    """Whether the file that defines a class calls transformers' attention interface."""
    return hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS")


def current_context() -> KVContext | None:
    """That of the pass under way, if it attends over a pool."""
    context = _CONTEXT.get()
    return context if isinstance(context, KVContext) else None


class _OwnAttention:
    """Replaces `_attn(query, key, value, attention_mask)` of layers older than the interface (GPT-J, CodeGen).

    The layer does its projections and positions as ever; only scores, softmax and the sum over values are ours.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.original = layer._attn  # noqa: SLF001  # see attach

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[1, heads, num_tokens, head_dim] in and out, as the original."""
        context = _CONTEXT.get()
        if context is None:
            result: tuple[torch.Tensor, torch.Tensor | None] = self.original(query, key, value, attention_mask)
            return result
        output = context.attend(self._layer, query.to(value.dtype), key.to(value.dtype), value, attention_mask)
        return output.transpose(1, 2), None


def _enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _CONTEXT.set(kwargs.pop("streamkv_context", None))
    return args, kwargs


def _leave(_module: Any, _args: Any, _output: Any) -> None:
    _CONTEXT.set(None)  # else the last pool would outlive its engine


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    context = _CONTEXT.get()
    assert context is not None, "the model is called without streamkv_context, or attach was not called"
    output = context.attend(module, query, key, value, attention_mask, **kwargs)
    return output.contiguous(), None  # some families take views of it


def _mask(**kwargs: Any) -> torch.Tensor | None:
    context = _CONTEXT.get()
    assert context is not None, "the model is called without streamkv_context, or attach was not called"
    return context.mask(**kwargs)

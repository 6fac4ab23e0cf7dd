"""Rotated queries and keys that are not computed yet: the backend may do it together with what it does to them first.

transformers rotates in one call and attends in another. Between them stands an object that says what it will be, shape, dtype and
strides, and has no memory. If attention is the first to want its numbers it takes what they are made of; whoever else wants
them, by any operation of torch or by their address, gets them computed. So nothing has to be known of a model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

__all__ = ["Deferred", "Rotation", "defer", "pending"]

Parts = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class Rotation:
    """A call of `FusedOps.rotate` that was not made.

    Attributes:
        query, key: [1, heads, num_tokens, head_dim], not rotated.
        cos, sin: [1, num_tokens, head_dim].
        rotate: makes it.
    """

    query: torch.Tensor
    key: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    rotate: Callable[[], Parts]
    done: Parts | None = None

    def result(self) -> Parts:
        """Make it now, once."""
        if self.done is None:
            query, key = self.rotate()
            self.done = (_laid_out(query), _laid_out(key))
        return self.done


class Deferred(torch.Tensor):
    """Part `part` of what a rotation gives. Operations get the real one, and give real ones."""

    rotation: Rotation
    part: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001  # torch's documented way

    def __new__(cls, rotation: Rotation, part: int) -> Deferred:
        """Looks as what there will be."""
        source = (rotation.query, rotation.key)[part]
        self: Deferred = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001  # as above
            cls,
            source.shape,
            strides=_strides(source.shape),
            dtype=source.dtype,
            device=source.device,
        )
        self.rotation, self.part = rotation, part
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever it is, it wants the numbers."""
        args, kwargs = tree_map_only(cls, lambda one: one.rotation.result()[one.part], (args, kwargs or {}))
        return func(*args, **kwargs)

    def data_ptr(self) -> int:
        """Of the real one: kernels of our own are no operations of torch."""
        return self.rotation.result()[self.part].data_ptr()


def _strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of [1, heads, num_tokens, head_dim] where a token's heads lie side by side."""
    _, heads, num_tokens, head_dim = shape
    return num_tokens * heads * head_dim, head_dim, heads * head_dim, 1


def _laid_out(heads: torch.Tensor) -> torch.Tensor:
    """As a `Deferred` says that it lies, which is how backends give it."""
    strides = _strides(heads.shape)
    return heads if heads.stride() == strides else heads.new_empty_strided(heads.shape, strides).copy_(heads)


def defer(rotation: Rotation) -> Parts:
    """Its queries and its keys."""
    return Deferred(rotation, 0), Deferred(rotation, 1)


def pending(query: torch.Tensor, key: torch.Tensor) -> Rotation | None:
    """The rotation whose queries and keys these are, if nobody has wanted them before."""
    if not isinstance(query, Deferred) or not isinstance(key, Deferred) or query.rotation is not key.rotation:
        return None
    return query.rotation if query.rotation.done is None and (query.part, key.part) == (0, 1) else None

"""Making modules on torch's meta device, whose tensors have shapes and no values, without torch's compiler.

torch computes there in Python and imports its compiler for it, which takes 0.8 s. But what a model computes while it is made is
either thrown away, random weights, or small: the frequencies of its rope, the scale of its embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["computing_off_meta"]

T = TypeVar("T")

_FILLS: Final = frozenset({"normal_", "uniform_", "kaiming_uniform_"})
"""Names, because torch.Tensor, torch.nn.init and transformers.initialization each have theirs."""

_VALUES: Final = (torch.arange, torch.tensor)

log = structlog.get_logger(__name__)


def computing_off_meta(make: Callable[[], T]) -> T:
    """What `make` returns, called so that it computes little on the meta device.

    Where a model mixes what is then on the CPU with what is not, torch refuses, and `make` is called again as it is.
    """
    try:
        with _OffMeta():
            return make()
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        log.debug("computed_on_meta", reason=str(error))
    return make()


class _OffMeta(TorchFunctionMode):
    """Tensors on the meta device stay unfilled; those that are made with values of their own are made on the CPU.

    Nothing comes of either: transformers makes every tensor anew that the weights do not have, and fills it then.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch.overrides wants it."""
        kwargs = kwargs or {}
        if func in _VALUES and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            made = func(*args, **kwargs | {"device": "cpu"})
            return made if made.numel() else made.to("meta")  # transformers asks an empty one which device it is on
        if getattr(func, "__name__", None) in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)

"""Finds code that would wait for a GPU, without one: reading on the host what the device computes.

    decide_as_on_a_gpu(monkeypatch)
    with NoSync(logits):              what these tensors lead to is computed by the device
        tokens, finite = sampler.sample(rows, positions, logits)

Whatever is computed from marked tensors is marked, and so is what a kernel was given. Marks belong to memory, so that views share
them. Copies to the device are not seen: only a GPU tells pinned memory from other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["NoSync", "WouldWaitError", "decide_as_on_a_gpu"]

READS: Final = frozenset(
    {"item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "bincount"}
    | {"masked_select", "unique", "unique_consecutive", "__bool__", "__int__", "__float__", "__index__", "__complex__"}
    | {"__array__", "__contains__", "__repr__", "__format__"}
)
"""Their results, or the shapes of these, have to be known to the host."""

INDEXED: Final = frozenset(("__getitem__", "__setitem__", "index_put", "index_put_"))


class WouldWaitError(AssertionError):
    """On a GPU this call would wait until all that is queued has been computed."""


class NoSync(TorchFunctionMode):
    """See the module's docstring."""

    def __init__(self, *computed: torch.Tensor) -> None:
        """Mark what the device computes."""
        super().__init__()
        self._kept: dict[int, torch.UntypedStorage] = {}  # by address; kept, so that nothing else gets the address
        self.mark(*computed)

    def mark(self, *computed: torch.Tensor) -> None:
        """These too are computed by the device."""
        for tensor in computed:
            storage = tensor.untyped_storage()
            if storage.data_ptr():
                self._kept[storage.data_ptr()] = storage

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        given = list(_tensors((args, kwargs)))
        if name == "data_ptr":  # by a kernel, which reads or writes it on the device
            self.mark(*given)
        elif any(tensor.untyped_storage().data_ptr() in self._kept for tensor in given):
            if _waits(name, args, kwargs):
                raise WouldWaitError(f"{name} on what the device computes")
            result = function(*args, **kwargs)
            in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            self.mark(*_tensors((result, kwargs.get("out"), args[0] if in_place else None)))
            return result
        return function(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in INDEXED:
        # Masks are turned into indices; a bound of a slice, and a single index, into a number.
        parts = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        bounds = any(isinstance(part, slice) for part in parts for _ in _tensors(part))
        return bounds or any(one.dtype in (torch.bool, torch.uint8) or not one.dim() for one in _tensors(args[1]))
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and len(list(_tensors((args, kwargs)))) > 1
    return name in READS


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, slice):
        yield from _tensors([value.start, value.stop, value.step])


def decide_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runner looks at numbers because a processor has them at hand, it does not."""
    for module in ("sampling_cuts", "sampler", "sampling_logprobs"):
        monkeypatch.setattr(f"streamkv.runner.{module}.looking_is_free", lambda _device: False)

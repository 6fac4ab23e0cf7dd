"""The first probe of a loaded model: a pass that writes down what each attention layer asks for, and refuses what is unknown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from streamkv.attention import LayerSpec
from streamkv.runner.arch_needs import refuse
from streamkv.runner.arch_plain import hidden_from, softmax_attention

__all__ = ["Survey"]

_READ: Final = frozenset({"scaling", "softcap", "s_aux", "sliding_window"})
_WITHOUT_MEANING: Final = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions"})
"""No dropout when serving, causality is seen in the mask, positions are in q and k already."""
_FEW_KEYS: Final = 8
_MANY_KEYS: Final = 2048
_LARGE_SCORES: Final = 3.0
"""Standard deviation of the scores in the equation's check: soft-capping shows in scores, not near 0."""

_MaskFunction = Callable[[Tensor, int, Tensor, Tensor], Tensor]


class Survey:
    """Context of one pass over one sequence that starts at position 0."""

    def __init__(self, module: Any, max_len: int) -> None:
        """Nothing seen yet.

        Args:
            module: named in refusals.
            max_len: most tokens of a sequence.
        """
        self._module = module
        self._max_len = max_len
        self._layers: dict[int, LayerSpec] = {}
        self._keys: list[Tensor] = []  # kept, so that no address is used twice
        self._masks: list[tuple[Tensor, _MaskFunction]] = []
        self._windows: dict[int, int | None] = {}  # by id of the mask
        self._equations: set[tuple[type, LayerSpec]] = set()  # already checked

    def specs(self) -> tuple[LayerSpec, ...]:
        """All layers in order.

        Raises:
            ModelLoadError: none was entered, or one is missing.
        """
        count = len(self._layers)
        if not count:
            refuse("layers", self._module, what="never entered")
        if sorted(self._layers) != list(range(count)):
            refuse("layers", self._module, what=f"numbered {', '.join(map(str, sorted(self._layers)))}")
        return tuple(self._layers[index] for index in range(count))

    def mask(self, **kwargs: Any) -> Tensor:
        """The mask of the model's own eager attention; the function that made it is remembered."""
        mask: Tensor = eager_mask(**kwargs)
        self._masks.append((mask, kwargs["mask_function"]))
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Look at one layer, then attend as it asks."""
        index = self._index(module)
        self._check_tensors(index, query, key, value)
        self._check_arguments(index, kwargs)
        scaling = kwargs.get("scaling")
        spec = LayerSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            window=self._window(index, attention_mask),
            soft_cap=kwargs.get("softcap"),
            has_sinks=kwargs.get("s_aux") is not None,
        )
        self._layers[index] = spec
        if (type(module), spec) not in self._equations:
            self._equations.add((type(module), spec))
            self._check_equation(index, module, spec, kwargs, value.device)
        return softmax_attention(query[0], key[0], value[0], spec, kwargs.get("s_aux"))[None]

    def _index(self, module: nn.Module) -> int:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            refuse("layers", self._module, what="not numbered")
        if index in self._layers:
            refuse("layers", self._module, what=f"entered twice (layer {index})")
        return index

    def _check_tensors(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            refuse("width", self._module, index=index, key=key.shape[-1], value=value.shape[-1])
        if any(key.data_ptr() == other.data_ptr() for other in self._keys):
            refuse("own_kv", self._module)
        self._keys.append(key)

    def _check_arguments(self, index: int, kwargs: dict[str, Any]) -> None:
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        unknown = given - _READ - _WITHOUT_MEANING
        if unknown:
            refuse("arguments", self._module, index=index, what=", ".join(sorted(unknown)))

    def _window(self, index: int, mask: Tensor | None) -> int | None:
        """The window that a layer's mask shows; the mask is what the model's own attention obeys, whatever else it is told."""
        if mask is None:
            refuse("mask", self._module, index=index, what="no causal mask")
        function = next((function for made, function in self._masks if made is mask), None)
        if function is None:
            refuse("mask", self._module, index=index, what="a mask of its own making")
        if id(mask) not in self._windows:
            self._windows[id(mask)] = self._window_of(index, function, mask.device)
        return self._windows[id(mask)]

    def _window_of(self, index: int, function: _MaskFunction, device: torch.device) -> int | None:
        """Asked about the last position, a mask tells its window; asked about others, whether that was all."""
        last = self._max_len - 1
        batch = torch.zeros((), dtype=torch.long, device=device)
        positions = torch.arange(self._max_len, device=device)

        def visible(query: int) -> Tensor:
            try:
                return function(batch, 0, torch.tensor(query, device=device), positions).expand(positions.shape)
            except IndexError:  # it looks the tokens of this pass up
                refuse("mask", self._module, index=index, what="a mask that depends on the tokens")

        window = int(visible(last).sum())
        if not window:
            refuse("mask", self._module, index=index, what="a window of no tokens")
        border = {window - 2, window - 1, window, window + 1, 2 * window + 1}
        for query in {0, 1, 2, last // 3, last // 2, last} | border:
            expected = (positions <= query) & (positions > query - window)
            if 0 <= query <= last and not torch.equal(visible(query), expected):
                refuse("mask", self._module, index=index, what="a mask of another shape")
        return window if window <= last else None

    def _check_equation(
        self, index: int, module: nn.Module, spec: LayerSpec, kwargs: dict[str, Any], device: torch.device
    ) -> None:
        """The layer's own eager function against ours on random vectors: a chunk, and one token that looks far back."""
        own = _eager_function(module, kwargs)
        if own is None:
            return  # then the logits of the whole model must tell
        generator = torch.Generator().manual_seed(index)
        size = _LARGE_SCORES / (spec.scale * spec.head_dim**0.5)
        for new, context in ((_FEW_KEYS, _FEW_KEYS), (1, min(_MANY_KEYS, self._max_len))):
            query = torch.randn(1, spec.num_heads, new, spec.head_dim, generator=generator).to(device) * size
            key = torch.randn(1, spec.num_kv_heads, context, spec.head_dim, generator=generator).to(device)
            value = torch.randn(1, spec.num_kv_heads, context, spec.head_dim, generator=generator).to(device)
            hidden = hidden_from(new, context, spec.window, device)
            mask = torch.zeros(1, 1, new, context, device=device).masked_fill(hidden, torch.finfo(torch.float32).min)
            ours = softmax_attention(query[0], key[0], value[0], spec, kwargs.get("s_aux"))
            if not torch.allclose(own(query, key, value, mask)[0].float(), ours, rtol=1e-3, atol=1e-3):
                refuse("equation", self._module, index=index)


def _eager_function(module: Any, kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
    """(q, k, v, mask) -> [1, new, num_heads, head_dim] by the model's own code, or None if it has no function of its own."""
    replaced = getattr(module, "_attn", None)
    if replaced is not None and hasattr(replaced, "original"):  # see hook.attach
        return lambda *tensors: replaced.original(*tensors)[0].transpose(1, 2)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return None if eager is None else lambda *tensors: eager(module, *tensors, **kwargs)[0]

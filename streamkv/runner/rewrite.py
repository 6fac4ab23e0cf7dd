"""The runner's one rewriter: a loaded model's modules give way to faster ones that compute the same.

    linear layers         weights laid out once, at load; those that read the same input merged into one product
    norms, gated MLPs     one call instead of six
    rotary embedding      one call for queries and keys, or none: where nothing lies between it and attention, that rotates

Nothing is known of families. A module is replaced if it has the parts that its replacement needs **and** gives the same numbers
on a random input: what is unknown, or does something beside, stays as it is. transformers' code still drives the model, and
the untouched module is the oracle in the tests.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from streamkv.fused import Activation, FusedOps
from streamkv.runner.deferred import Rotation, defer
from streamkv.runner.hook import current_context

__all__ = ["rewrite"]

_MERGES: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NORM_STYLES: Final = ((0.0, True), (0.0, False), (1.0, False))  # (added to the weight, rounded before the product)
_ACTIVATIONS: Final[tuple[Activation, ...]] = ("silu", "gelu_tanh")
_ROTATE: Final = "apply_rotary_pos_emb"
_LANES: Final = 16

Pack = Callable[[nn.Linear], nn.Module | None]


def rewrite(module: Any, ops: FusedOps | None, pack: Pack) -> Counter[str]:
    """Replace what can be replaced, in place; plain weights are dropped one by one.

    Args:
        ops: the backend's; None = only linear layers are packed.
        pack: makes a packed layer of a plain one, or None.

    Returns:
        How many modules of each kind were replaced.
    """
    done: Counter[str] = Counter()
    # First, while no other page of a mapped file is in memory: tied to the embedding, its plain weight stays.
    _pack_head(module, pack, done)
    # No list of linear layers: it would keep every plain weight until the end.
    for parent in [one for one in module.modules() if not isinstance(one, nn.Linear)]:
        if ops is not None:
            _fuse_norms(parent, ops, done)
            activation = _gated_by(parent, ops)
            for names in _MERGES:
                _merge(parent, names, pack, done)
            if activation is not None and isinstance(getattr(parent, _MERGES[1][0]), _Part):
                _fuse_gate(parent, activation, ops, pack, done)
        _pack_children([parent], pack, done)
    if ops is not None:
        _fuse_rotation(module, ops, done)
    return done


def _pack_head(module: Any, pack: Pack, done: Counter[str]) -> None:
    head = module.get_output_embeddings()
    for parent in module.modules():
        for name, child in list(parent.named_children()):
            if child is head and type(child) is nn.Linear and (packed := pack(child)) is not None:
                setattr(parent, name, packed)
                done["linear"] += 1
                return


def _pack_children(parents: list[nn.Module], pack: Pack, done: Counter[str]) -> None:
    for parent in parents:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (packed := pack(child)) is not None:
                setattr(parent, name, packed)
                done["linear"] += 1


# -- merged products ----------------------------------------------------------------------------------------------------


class _Merged:
    """Several layers that read the same input, as one; not a module, so that its weight is nobody's child twice."""

    def __init__(self, packed: nn.Module, widths: list[int]) -> None:
        self.packed = packed
        self._widths = widths
        self._given: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer `index`; computed with all others when an input comes for the first time."""
        if x is not self._given:
            self._given, self._parts = x, torch.split(self.packed(x), self._widths, dim=-1)
        part = self._parts[index]
        if index == len(self._widths) - 1:
            self._given, self._parts = None, ()  # the last one that a model asks for: keep nothing beyond the layer
        return part


class _Part(nn.Module):
    """Stands where one of the merged layers stood."""

    def __init__(self, merged: _Merged, index: int, out_features: int) -> None:
        super().__init__()
        self.merged, self.index, self.out_features = merged, index, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], a view."""
        return self.merged.part(self.index, x)


def _merge(parent: nn.Module, names: tuple[str, ...], pack: Pack, done: Counter[str]) -> None:
    layers = [getattr(parent, name, None) for name in names]
    plain: list[nn.Linear] = [layer for layer in layers if type(layer) is nn.Linear]
    if (
        len(plain) < len(names)
        or len({(layer.in_features, layer.weight.dtype) for layer in plain}) > 1
        or len({id(layer) for layer in plain}) < len(names)
    ):
        return
    first, widths = plain[0], [layer.out_features for layer in plain]
    biased = any(layer.bias is not None for layer in plain)
    with torch.device("meta"):
        whole = nn.Linear(first.in_features, sum(widths), bias=biased, dtype=first.weight.dtype)
    whole.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in plain]), requires_grad=False)
    if biased:
        zeros = first.weight.new_zeros
        biases = [zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in plain]
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    # The layers live on in the whole one: never three copies at once, and nothing is lost if it cannot be packed.
    for layer, weight in zip(plain, torch.split(whole.weight.detach(), widths), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    packed = pack(whole)
    if packed is None:
        return
    merged = _Merged(packed, widths)
    for index, (name, layer) in enumerate(zip(names, plain, strict=True)):
        setattr(parent, name, _Part(merged, index, layer.out_features))
    done["merged"] += 1


# -- gated MLPs ---------------------------------------------------------------------------------------------------------


class _GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: Activation, ops: FusedOps) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down
        self._activation, self._ops = activation, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        result: torch.Tensor = self.down_proj(self._ops.gate(self.gate_up(x), self._activation))
        return result


def _gated_by(parent: nn.Module, ops: FusedOps) -> Activation | None:
    """The activation with which a module with the parts of a gated MLP is one, by its numbers; None if it is something else."""
    parts = [getattr(parent, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear for part in parts):
        return None
    gate, up, down = (part for part in parts if isinstance(part, nn.Linear))
    if gate.out_features != up.out_features or up.out_features % _LANES or gate.weight.dtype is not ops.dtype:
        return None
    given = _random(3, gate.in_features, like=gate.weight)
    # Near 0 activations look alike: what is gated must reach beyond that, and beyond where some families clamp.
    given = given * (4 / gate(given).float().std()).to(given.dtype)
    wanted = _try(parent, given)
    both = torch.cat([gate(given), up(given)], dim=-1)
    return next((name for name in _ACTIVATIONS if _same(down(ops.gate(both, name)), wanted)), None)


def _fuse_gate(parent: Any, activation: Activation, ops: FusedOps, pack: Pack, done: Counter[str]) -> None:
    """The module keeps its name and its hooks, its parts go."""
    fused = _GatedMLP(parent.gate_proj.merged.packed, parent.down_proj, activation, ops)
    _pack_children([fused], pack, done)
    for name in list(parent._modules):  # noqa: SLF001  # no public way to empty a module
        delattr(parent, name)
    parent.fused = fused
    parent.forward = fused.forward
    done["gate"] += 1


# -- norms --------------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    """Root mean square norm by the backend."""

    def __init__(self, plain: nn.Module, weight: torch.Tensor, eps: float, style: tuple[float, bool], ops: FusedOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._plain = (plain,)  # no child: it is there for what the proof has not seen
        self._eps, (self._offset, self._round_first), self._ops = eps, style, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        if x.dtype is not self._ops.dtype or x.shape[-1:] != self.weight.shape:
            result: torch.Tensor = self._plain[0](x)
            return result
        return self._ops.rms_norm(x, self.weight, self._eps, offset=self._offset, round_first=self._round_first)


def _fuse_norms(parent: nn.Module, ops: FusedOps, done: Counter[str]) -> None:
    for name, child in list(parent.named_children()):
        fused = _norm(child, ops)
        if fused is not None:
            setattr(parent, name, fused)
            done["norm"] += 1


def _norm(module: nn.Module, ops: FusedOps) -> _Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(eps, float) or list(module.children()) or isinstance(module, _Norm):
        return None
    if weight.dim() != 1 or weight.dtype is not ops.dtype or len(weight) % _LANES or len(list(module.parameters())) > 1:
        return None
    given = _norm_inputs(len(weight), eps, like=weight)
    wanted = _try(module, given)
    if not isinstance(wanted, torch.Tensor):
        return None
    fused = [_Norm(module, weight, eps, style, ops) for style in _NORM_STYLES]
    # When it is rounded shows in some last bits only: all styles may pass, and one of them is nearest.
    return min((one for one in fused if _same(one(given), wanted)), key=lambda one: _distance(one(given), wanted), default=None)


def _norm_inputs(width: int, eps: float, like: torch.Tensor) -> torch.Tensor:
    """[3, width]: rows far from the mean 0 that others subtract, and small enough for eps to count."""
    scale = torch.tensor([[1.0], [30.0], [eps**0.5]])
    return ((_random(3, width, like=like).float() + 2) * scale).to(like.dtype)


# -- rotary embedding ---------------------------------------------------------------------------------------------------


def _fuse_rotation(module: nn.Module, ops: FusedOps, done: Counter[str]) -> None:
    """Families keep the function in the file of their attention; there it is replaced, for passes that run with our context."""
    for name in {type(layer).__module__ for layer in module.modules()}:
        file = sys.modules.get(name)
        original = getattr(file, _ROTATE, None)
        if original is None or isinstance(original, _Rotation) or not _rotates_halves(original, ops):
            done["rotation"] += isinstance(original, _Rotation)
            continue
        setattr(file, _ROTATE, _Rotation(original))
        done["rotation"] += 1


class _Rotation:
    """`apply_rotary_pos_emb(q, k, cos, sin)` by the ops of the context that is entered, or as ever.

    A backend that rotates as it attends is left to do so, unless the family wants the numbers before: learned by trying.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._defers = True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current_context()
        ops = None if context is None else context.backend.ops
        if context is None or ops is None or args or kwargs or not _fits(q, k, cos, sin, ops):
            return self._original(q, k, cos, sin, *args, **kwargs)
        if context.rotator is None or not self._defers:
            return ops.rotate(q, k, cos, sin)

        def rotate_after_all() -> tuple[torch.Tensor, torch.Tensor]:
            self._defers = False
            return ops.rotate(q, k, cos, sin)

        return defer(Rotation(q, k, cos, sin, rotate_after_all))


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ops: FusedOps) -> bool:
    return (
        q.dtype is k.dtype is cos.dtype is sin.dtype is ops.dtype
        and q.dim() == 4
        and k.dim() == 4
        and q.shape[0] == k.shape[0] == 1
        and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        and k.shape[2:] == q.shape[2:]
        and q.shape[3] % (2 * _LANES) == 0
    )


def _rotates_halves(function: Any, ops: FusedOps) -> bool:
    like = torch.empty(0, dtype=ops.dtype)
    q, k, cos, sin = (_random(1, heads, 3, 64, like=like) for heads in (2, 1, 1, 1))
    wanted = _try(function, q, k, cos[:, 0], sin[:, 0])
    if not isinstance(wanted, tuple) or len(wanted) != 2:
        return False
    return all(_same(one, other) for one, other in zip(ops.rotate(q, k, cos[:, 0], sin[:, 0]), wanted, strict=True))


# -- proofs -------------------------------------------------------------------------------------------------------------


def _random(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _try(module: Any, *given: torch.Tensor) -> Any:
    """What a module makes of some input; None if it wants something else."""
    try:
        return module(*given)
    except Exception:  # any: it is not what it looks like, and stays
        return None


def _same(one: torch.Tensor, other: Any) -> bool:
    """Equal but for the last bit of some numbers: sums are taken in another order."""
    if not isinstance(other, torch.Tensor) or one.shape != other.shape or one.dtype is not other.dtype:
        return False
    difference, scale = (one.float() - other.float()).abs(), other.float().abs()
    last_bit = torch.finfo(one.dtype).eps
    # Row by row: a small one must not hide behind a large one.
    return bool((difference <= 2 * last_bit * torch.maximum(scale, scale.mean(dim=-1, keepdim=True))).all())


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().sum())

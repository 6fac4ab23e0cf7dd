"""torch's compiler kept out of a process that does not compile: importing it takes 0.8 s.

transformers imports `torch._dynamo` for one context manager of its masks and for marks on a few functions. torch itself imports it
when it first computes the shape of a tensor on the meta device, where models are made before their weights are read: to mark its
own function, and for questions about numbers that could be symbols.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final, TypeVar

import structlog

__all__ = ["COMPILER", "without_compiler"]

T = TypeVar("T")

COMPILER: Final = "torch._dynamo"
_MASKS: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
_SYMBOLS: Final = "torch.fx.experimental.symbolic_shapes"
_MARK: Final = "__dynamo_disable"
"""Attribute by which torch remembers what `disable` has made of a function of its own."""

log = structlog.get_logger(__name__)


def without_compiler(function: Callable[[], T]) -> T:
    """The function's result, with stand-ins in the place of the compiler's modules where those are not imported yet.

    They know what is said above. If one is asked for more and the function fails, it is called once again without them. When this
    returns they are gone: whoever wants the compiler imports it.
    """
    import torch  # noqa: F401  # the whole of it sees no stand-in

    missing: list[str] = []
    try:
        with _stand_ins(missing):
            return function()
    except Exception:
        if not missing:
            raise
    log.info("compiler_wanted", names=missing)
    return function()


class _StandIn(ModuleType):
    def __init__(self, name: str, missing: list[str], known: dict[str, Any]) -> None:
        super().__init__(name)
        self._missing = missing
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" or not name.startswith("__"):  # `inspect` asks all modules for their `__file__`
            self._missing.append(f"{self.__name__}.{name}")
        raise AttributeError(f"{self.__name__} has a stand-in without {name}")


@contextmanager
def _stand_ins(missing: list[str]) -> Iterator[None]:
    """In `sys.modules` and in their packages; what the modules are asked for in vain is added to `missing`."""
    unmarked: list[Any] = []

    def disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
        """A decorator, with or without arguments, that leaves functions as they are."""
        if function is None:
            return disable
        unmarked.append(function)
        return function

    compiler = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), disable)
    known = {COMPILER: compiler, _MASKS: {"TransformGetItemToIndex": _transform}, _SYMBOLS: _PLAIN}
    modules = {name: _StandIn(name, missing, known[name]) for name in known if name not in sys.modules}
    places = [(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in modules if name != _MASKS]
    sys.modules |= modules
    for package, name in places:
        setattr(package, name, modules[f"{package.__name__}.{name}"])
    try:
        yield
    finally:
        for package, name in places:
            delattr(package, name)
        for name in modules:
            del sys.modules[name]
        for function in unmarked:
            getattr(function, "__dict__", {}).pop(_MARK, None)


def _transform() -> Any:
    """The real context manager, when a mask needs it."""
    return importlib.import_module(_MASKS).TransformGetItemToIndex()


def _same(number: Any, *_: Any) -> Any:
    return number


_PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "expect_true": _same,
    "guard_or_false": _same,
    "guard_or_true": _same,
    "guarding_hint_or_throw": _same,
    "statically_known_true": _same,
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
    "sym_eq": lambda x, y: tuple(x) == tuple(y) if isinstance(x, (tuple, list)) else x == y,
}
"""Those functions for numbers that are numbers."""

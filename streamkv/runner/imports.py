"""transformers without what serving never runs, for processes that are ours.

`transformers.modeling_utils` imports torch's compiler (`torch._dynamo`) for one context manager of its masks and for marks on a
few functions, and torch.distributed's tensors, checkpoints and FSDP because somebody could ask for them: with SymPy behind both,
two thirds of what it costs. Here a stand-in answers for the compiler meanwhile, and transformers is told that there is nothing to
distribute. If it wants more than the stand-in has, it is imported plainly: slower, nothing else.

Only commands do this. A program that imports `streamkv.LLM` may want of transformers what we do not.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import structlog

__all__ = ["COMPILER", "import_transformers"]

COMPILER: Final = "torch._dynamo"

_MASKS: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
_MODULES: Final = ("transformers.modeling_utils", "transformers.masking_utils", "transformers.generation.utils")
_QUESTIONS: Final = ("is_torch_distributed_available", "is_accelerate_available", "is_scipy_available")
"""What transformers asks before it imports a package that only training and many devices need; answered with no from then on."""

log = structlog.get_logger(__name__)


def import_transformers() -> None:
    """Import transformers' models with as little else as they need; once per process, before anything else imports them.

    `torch.compile` and transformers' own attention work afterwards as ever, and import the compiler when they are used. It then
    lacks the marks that transformers sets for FP8 on GPUs and for its own continuous batching.
    """
    if any(name in sys.modules for name in (COMPILER, *_MODULES)):
        return
    gc.disable()  # nearly all that imports make stays
    try:
        _answer_no()
        _scan_models()
        _import_models()
    finally:
        gc.freeze()
        gc.enable()


def _answer_no() -> None:
    from transformers import utils

    for module in (utils, utils.import_utils):
        for question in _QUESTIONS:
            if hasattr(module, question):
                setattr(module, question, lambda: False)


def _scan_models() -> None:
    """Once: transformers reads all its files for the names in them, and again for its sub-package `models`, 0.2 s.

    The first result is in a cache, under the folder; the second time it looks under the folder's `__init__.py`.
    """
    from transformers.utils import import_utils

    scan = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:
        return
    import_utils.create_import_structure_from_path = lambda path: scan(
        Path(path).parent if str(path).endswith("__init__.py") else path
    )
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.create_import_structure_from_path = scan


def _import_models() -> None:
    try:
        with _compiler_stand_in():
            for name in _MODULES:
                importlib.import_module(name)
    except Exception as error:  # whatever a module does without a name that it wants; who needs it imports it again
        log.info("imported_plainly", reason=repr(error))


@contextmanager
def _compiler_stand_in() -> Iterator[None]:
    """As much of the compiler as transformers uses while it is imported, in sys.modules."""
    compiler, masks = ModuleType(COMPILER), ModuleType(_MASKS)
    vars(compiler).update(disable=_unmarked, allow_in_graph=_unmarked, assume_constant_result=_unmarked)
    vars(masks).update(TransformGetItemToIndex=_transform)
    sys.modules |= {COMPILER: compiler, _MASKS: masks}
    try:
        yield
    finally:
        del sys.modules[COMPILER], sys.modules[_MASKS]


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A decorator, with or without arguments, that leaves functions as they are."""
    return function if function is not None else _unmarked


def _transform() -> Any:
    """The real context manager, when a mask needs it."""
    return importlib.import_module(_MASKS).TransformGetItemToIndex()

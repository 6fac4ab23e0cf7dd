"""The kernels' library as Python sees it: structs and signatures, mirrors of `kernels/*.h`.

torch is imported first: the library then runs on torch's own OpenMP team, and the number of threads is torch's.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final

import torch  # noqa: F401  # see above: before the library

from streamkv.errors import BackendError
from streamkv_backends.cpu.build import detect, find_or_build

__all__ = [
    "Add",
    "Argmax",
    "Attend",
    "Call",
    "Gate",
    "Linear",
    "Norm",
    "Op",
    "Rotate",
    "Shape",
    "Step",
    "Weight",
    "library",
    "load",
]


class Step(ctypes.Structure):
    """One step's packed batch (`attention.h`)."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("num_seqs", "num_tokens", "max_blocks", "block_size")),
        *((name, c_void_p) for name in ("query_start", "seq_lens", "block_tables", "slots")),
    ]


class Shape(ctypes.Structure):
    """A layer's attention facts."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        ("scale", c_float),
        ("soft_cap", c_float),
    ]


class Call(ctypes.Structure):
    """A layer's tensors; strides in elements."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("pool", "query", "key", "value")),
        *((f"{name}_{axis}", c_int64) for name in ("query", "key", "value") for axis in ("token", "head")),
        ("sinks", c_void_p),
        ("out", c_void_p),
        ("is_float", c_int32),
    ]


class Norm(ctypes.Structure):
    """Root mean square norm (`rows.h`)."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("outer_stride", c_int64),
        ("inner_stride", c_int64),
        *((name, c_int32) for name in ("outer", "inner", "width", "round_first")),
        ("weight", c_void_p),
        ("eps", c_float),
        ("offset", c_float),
        ("out", c_void_p),
    ]


class Gate(ctypes.Structure):
    """out = act(gate) * up."""

    _fields_: ClassVar = [("x", c_void_p), *((name, c_int32) for name in ("rows", "width", "kind")), ("out", c_void_p)]


class Add(ctypes.Structure):
    """out = a + b."""

    _fields_: ClassVar = [*((name, c_void_p) for name in ("a", "b", "out")), ("count", c_int64)]


class Rotate(ctypes.Structure):
    """Rotary position embedding of queries and keys."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("query", "key", "cos", "sin")),
        *((f"{name}_{axis}", c_int64) for name in ("query", "key") for axis in ("token", "head")),
        *((name, c_int32) for name in ("tokens", "query_heads", "key_heads", "dim")),
        ("query_out", c_void_p),
        ("key_out", c_void_p),
    ]


class Argmax(ctypes.Structure):
    """Of each row the first of its largest numbers, and whether all are finite."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("stride", c_int64),
        ("rows", c_int32),
        ("width", c_int32),
        ("index", c_void_p),
        ("finite", c_void_p),
    ]


class Weight(ctypes.Structure):
    """A packed weight (`team.h`)."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        *((name, c_int32) for name in ("n", "k", "format")),
    ]


class Linear(ctypes.Structure):
    """A product with a packed weight (`run.cpp`)."""

    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("m", c_int32),
        ("flags", c_int32),
        ("scratch", c_void_p),
    ]


class Attend(ctypes.Structure):
    """An attention layer in a recorded step (`run.cpp`)."""

    _fields_: ClassVar = [("call", POINTER(Call)), ("shape", c_int32)]


class Op(ctypes.Structure):
    """One operation of a recorded step."""

    _fields_: ClassVar = [("kind", c_int32), ("call", c_void_p)]


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "skv_plan": (c_void_p, (POINTER(Step), POINTER(Shape))),
    "skv_plan_free": (None, (c_void_p,)),
    "skv_plan_kinds": (None, (c_void_p, c_void_p)),
    "skv_attend": (None, (c_void_p, c_void_p)),
    **{f"skv_{name}": (None, (c_void_p,)) for name in ("norm", "gate", "add", "rotate", "argmax")},
    "skv_linear_scratch": (c_int64, (c_void_p, c_int32)),
    "skv_linear_call": (None, (c_void_p,)),
    "skv_threads": (c_int32, ()),
    "skv_run": (None, (c_void_p, c_int32, c_void_p, c_int32, c_void_p)),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """The library for this machine, compiled the first time.

    Raises:
        BackendError: it cannot be had here; one sentence says why.
    """
    return load(find_or_build(detect()))


def load(path: Path) -> Any:
    """Load a library and give its functions their types.

    Raises:
        BackendError: the system's loader refuses it.
    """
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path.name} cannot be loaded ({error}); delete it, or use --backend torch") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, list(arguments)
    return loaded

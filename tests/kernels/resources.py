"""What every variant of the kernels takes of a GPU, as a table: `python -m tests.kernels.resources [source ...]` writes it.

NVRTC needs no GPU for it. With names of sources only their rows are compiled anew. The test beside this file compiles some of
the variants again and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from streamkv_kernels.compile import ARCHITECTURES, compile_cubin, compiler_version
from streamkv_kernels.variants import Asked, asked

__all__ = ["COMPILED", "TABLE", "key", "read", "row"]

COMPILED: Final = (*ARCHITECTURES[:4], "sm_90a", *ARCHITECTURES[4:])
TABLE: Final = Path(__file__).parents[2] / "kernels_cuda" / "resources.md"
_HEAD: Final = """# What the kernels take

Registers of a thread, for each architecture; dynamic shared memory of a block, in bytes, as the wrappers ask for it. Behind a `+`
stand the bytes that spill: stores and loads of what found no register. Static shared memory is not used.

Written by `python -m tests.kernels.resources`, compiled by NVRTC {version}; `tests/kernels/test_resources.py` compares.

"""


def key(kernel: Asked) -> str:
    """How a row begins."""
    defines = " ".join(f"{name}={value}" for name, value in kernel.variant.defines)
    return f"| {kernel.variant.source} | {kernel.name} | {defines} | {kernel.shared_bytes} |"


def row(kernel: Asked, architectures: tuple[str, ...] = COMPILED) -> list[str]:
    """Registers for each architecture, with what spills."""
    cells = []
    for architecture in architectures:
        taken = compile_cubin(kernel.variant, architecture)[1][kernel.name]
        extra = f" + {taken.spilled} B" if taken.spilled else ""
        cells.append(f"{taken.registers}{extra}" + (f" + {taken.shared} B static" if taken.shared else ""))
    return cells


def read() -> tuple[str, dict[str, list[str]]]:
    """The compiler's version and the rows of the table, by how they begin."""
    text = TABLE.read_text()
    version = text.split("compiled by NVRTC ")[1].split(";")[0]
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line and not line.startswith("| source"):
            cells = line.split(" | ")
            rows[" | ".join(cells[:4]) + " |"] = [cell.strip(" |") for cell in cells[4:]]
    return version, rows


def main(sources: list[str]) -> None:
    """Compile, and write the table."""
    kernels = list(asked())
    old = read()[1] if sources else {}
    lines = ["| source | kernel | macros | shared | " + " | ".join(COMPILED) + " |", "|" + " --- |" * (4 + len(COMPILED))]
    for number, kernel in enumerate(kernels, 1):
        kept = None if kernel.variant.source in sources else old.get(key(kernel))
        lines.append(f"{key(kernel)} {' | '.join(kept or row(kernel))} |")
        print(f"\r{number}/{len(kernels)}", end="", file=sys.stderr, flush=True)
    TABLE.write_text(_HEAD.format(version=compiler_version()) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What every variant of the kernels takes of a GPU, as a table: `make kernels-resources` writes it.

NVRTC needs no GPU for it. Only rows whose code has changed are compiled anew: below the table stands what each source's code was,
so that a table of other code is found out without compiling. The test beside this file also compiles some of the variants again.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Final

from streamkv_kernels.compile import ARCHITECTURES, compile_cubin, compiler_version
from streamkv_kernels.device import SOURCES
from streamkv_kernels.variants import Asked, asked

__all__ = ["COMPILED", "Table", "code_of", "key", "row"]

COMPILED: Final = (*ARCHITECTURES[:4], "sm_90a", *ARCHITECTURES[4:])
_TABLE: Final = Path(__file__).parents[2] / "kernels_cuda" / "resources.md"
_COLUMNS: Final = ("source", "kernel", "macros", "shared", *COMPILED)
_HEAD: Final = """# What the kernels take

Registers of a thread, for each architecture; dynamic shared memory of a block, in bytes, as the wrappers ask for it. Nothing
spills: no thread keeps anything in local memory (`tests/kernels/test_resources.py`). Static shared memory is not used.

Written by `make kernels-resources`, compiled by NVRTC {version}.

"""
_CODE_HEAD: Final = "\n\nDigests of the code that was compiled, without its comments:\n\n| code | digest |\n| --- | --- |\n"


def code_of(source: str) -> str:
    """A digest of a source and of the headers it includes, as a GPU gets them: without comments."""
    texts, files = [], [f"{source}.cu"]
    for file in files:
        text = (SOURCES / file).read_text()
        files += [name for name in re.findall(r'#include "(\w+\.cuh)"', text) if name not in files]
        texts.append(" ".join(re.sub(r"//.*", "", text).split()))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def key(kernel: Asked) -> tuple[str, ...]:
    """How a row begins."""
    defines = " ".join(f"{name}={value}" for name, value in kernel.variant.defines)
    return kernel.variant.source, kernel.name, defines, str(kernel.shared_bytes)


def row(kernel: Asked, architectures: tuple[str, ...] = COMPILED) -> tuple[str, ...]:
    """Registers for each architecture; and, where it is any, local memory and static shared memory in bytes."""
    cells = []
    for architecture in architectures:
        taken = compile_cubin(kernel.variant, architecture)[1][kernel.name]
        local = f" + {taken.spilled + taken.stack} B local" if taken.spilled + taken.stack else ""
        cells.append(f"{taken.registers}{local}" + (f" + {taken.shared} B static" if taken.shared else ""))
    return tuple(cells)


class Table:
    """The committed one.

    Attributes:
        version: of the compiler.
        rows: registers for each architecture, by how the row begins.
        codes: `code_of` every source when its rows were compiled.
    """

    def __init__(self) -> None:
        text = _TABLE.read_text()
        self.version = text.split("compiled by NVRTC ")[1].split(".\n")[0]
        lines = [tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if line.startswith("| ")]
        lines = [line for line in lines if line[0] not in {"source", "code", "---"}]
        self.rows = {line[:4]: line[4:] for line in lines if len(line) == len(_COLUMNS)}
        self.codes = dict(line for line in lines if len(line) == 2)


def main() -> None:
    """Compile what has changed, and write the table."""
    kernels = list(asked())
    old, codes = Table(), {source: code_of(source) for source in sorted({kernel.variant.source for kernel in kernels})}
    lines = [_line(_COLUMNS), _line(("---",) * len(_COLUMNS))]
    for number, kernel in enumerate(kernels, 1):
        source = kernel.variant.source
        known = old.version == compiler_version() and old.codes.get(source) == codes[source]
        lines.append(_line((*key(kernel), *((known and old.rows.get(key(kernel))) or row(kernel)))))
        print(f"\r{number}/{len(kernels)}", end="", file=sys.stderr, flush=True)
    table, digests = "\n".join(lines), "\n".join(_line(item) for item in codes.items())
    _TABLE.write_text(f"{_HEAD.format(version=compiler_version())}{table}{_CODE_HEAD}{digests}\n")


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

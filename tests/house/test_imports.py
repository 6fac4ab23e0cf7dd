"""Who may import whom. The table is the architecture; a line that is not in it is a wrong import."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import streamkv
import streamkv_backends
import streamkv_kernels

SOURCES = Path(streamkv.__file__).parent.parent
ANYWHERE = {"streamkv.errors", "streamkv.logs"}
VALUES = {"streamkv.sampling_params"}
CORE = {"streamkv.core"}
API = {"streamkv.engine.api"}
SEAM = {"streamkv.attention", "streamkv.fused"}

MAY_IMPORT: dict[str, set[str]] = {
    # lowest first; a package's own modules are always allowed
    "streamkv.errors": set(),
    "streamkv.logs": set(),
    "streamkv.sampling_params": ANYWHERE,
    "streamkv.core": {"streamkv.errors"},
    "streamkv.fused": set(),
    "streamkv.attention": ANYWHERE | {"streamkv.fused"},
    "streamkv.entry_points": ANYWHERE,
    "streamkv.backend_registry": ANYWHERE | SEAM | {"streamkv.entry_points"},
    "streamkv.demo": set(),
    "streamkv.hub": ANYWHERE,
    "streamkv.runner": ANYWHERE | VALUES | CORE | SEAM | {"streamkv.entry_points"},
    "streamkv.engine": ANYWHERE
    | VALUES
    | CORE
    | SEAM
    | {"streamkv.runner", "streamkv.backend_registry", "streamkv.demo", "streamkv.hub"},
    "streamkv.text": ANYWHERE | VALUES | API,
    "streamkv.outputs": VALUES,
    "streamkv.async_engine": ANYWHERE | VALUES | API | {"streamkv.engine", "streamkv.text", "streamkv.outputs"},
    "streamkv.llm": ANYWHERE | VALUES | API | {"streamkv.engine", "streamkv.async_engine", "streamkv.outputs"},
    "streamkv.protocol": ANYWHERE | VALUES | {"streamkv.text.events", "streamkv.text.tokenizer"},
    "streamkv.observe": ANYWHERE | VALUES | API | {"streamkv.text"},
    "streamkv.server": ANYWHERE | VALUES | {"streamkv.protocol", "streamkv.text", "streamkv.observe", "streamkv"},
    "streamkv.client": ANYWHERE | VALUES | {"streamkv.protocol"},
    "streamkv.bench": ANYWHERE | {"streamkv.client"},
    "streamkv.cli": {"streamkv"},
    "streamkv.__main__": {"streamkv.cli"},
    # the top level's lazy names
    "streamkv": {"streamkv.llm", "streamkv.async_engine", "streamkv.outputs", "streamkv.sampling_params"},
    "streamkv.code_cache": {"streamkv.errors"},
    "streamkv_kernels": {"streamkv.errors", "streamkv.code_cache"},
    "streamkv_backends": SEAM | {"streamkv.errors", "streamkv.code_cache", "streamkv_kernels"},
}

FORBIDDEN_OUTSIDE: dict[str, set[str]] = {
    "streamkv.core": {"*"},  # standard library only
    "streamkv.protocol": {"aiohttp", "asyncio", "torch", "uvloop", "time"},  # sans-IO
    "streamkv.text": {"torch", "aiohttp", "uvloop", "transformers"},
    "streamkv.llm": {"aiohttp", "uvloop"},
    "streamkv.async_engine": {"aiohttp", "uvloop"},
    "streamkv.engine.api": {"torch", "asyncio"},
    "streamkv.observe": {"aiohttp", "torch", "transformers"},
    "streamkv.server": {"torch", "transformers"},
    "streamkv.client": {"torch", "transformers"},
    "streamkv.bench": {"torch", "transformers"},
}


def modules() -> dict[str, Path]:
    roots = [Path(package.__file__).parent for package in (streamkv, streamkv_backends, streamkv_kernels)]
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Every module named by an import statement, wherever it stands; `from package import module` names the module."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            modules_named = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            named |= modules_named or {node.module}
    return named


def owner(module: str) -> str:
    """The longest name in the table that covers a module."""
    names = [name for name in MAY_IMPORT if module == name or (module.startswith(name + ".") and name != "streamkv")]
    assert names, f"{module} has no place in the layers: add it to MAY_IMPORT"
    return max(names, key=len)


def covers(allowed: str, module: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


@pytest.mark.smoke
@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_layers_only(module: str) -> None:
    own = owner(module)
    for name in imports(MODULES[module]):
        if name.split(".")[0] not in ("streamkv", "streamkv_backends", "streamkv_kernels"):
            continue
        if own != "streamkv" and covers(own, name):
            continue
        assert any(covers(allowed, name) for allowed in MAY_IMPORT[own]), f"{module} must not import {name}"


@pytest.mark.parametrize("layer", sorted(FORBIDDEN_OUTSIDE))
def test_what_a_layer_must_not_know(layer: str) -> None:
    forbidden = FORBIDDEN_OUTSIDE[layer]
    for module, path in MODULES.items():
        if not covers(layer, module):
            continue
        outside = {name.split(".")[0] for name in imports(path)} - {"streamkv"}
        if forbidden == {"*"}:
            assert outside <= sys.stdlib_module_names, f"{module} imports {outside - set(sys.stdlib_module_names)}"
            assert not outside & {"asyncio", "time", "random", "socket", "threading"}, f"{module} is not pure"
        else:
            assert not outside & forbidden, f"{module} imports {outside & forbidden}"


def test_nothing_unpickles_and_nothing_trusts_remote_code() -> None:
    for module, path in MODULES.items():
        outside = {name.split(".")[0] for name in imports(path)}
        assert not outside & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, module
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                raise AssertionError(f"{module}: trust_remote_code is never on")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), module

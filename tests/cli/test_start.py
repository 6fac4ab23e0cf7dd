"""What each command imports. `docs/benchmarks.md` has the seconds; here are the modules that they would be spent on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamkv.cli import COMMANDS

LIMIT_S = 120

NOT_FOR_SERVING = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "sympy",
)
"""Each takes from a tenth of a second to one second."""

BESIDE = ("accelerate", "pandas", "scipy", "sklearn")
"""Packages that transformers imports where they are installed."""

COMMAND = """
import json, pathlib, sys
from streamkv.cli import main
try:
    status = main({arguments!r})
except SystemExit as error:
    status = error.code or 0
pathlib.Path({listing!r}).write_text(json.dumps(sorted(sys.modules)))
sys.exit(status)
"""


def command(arguments: list[str], listing: Path) -> list[str]:
    """Runs a command in an interpreter that writes down at its end what it has imported."""
    return [sys.executable, "-c", COMMAND.format(arguments=arguments, listing=str(listing))]


def installed(names: tuple[str, ...], folder: Path) -> Path:
    """A folder in which importlib finds these packages; whoever takes something from them fails."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('__version__ = "99.0"\n')
        about = folder / f"{name}-99.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_neither_torch_nor_a_server(arguments: list[str], tmp_path: Path) -> None:
    subprocess.run(command(arguments, tmp_path / "modules"), check=True, capture_output=True, timeout=LIMIT_S)
    modules = set(json.loads((tmp_path / "modules").read_text()))
    assert "streamkv.cli" in modules
    assert not modules & {"torch", "transformers", "uvloop", "streamkv.server.app", "streamkv.engine.build"}
    if len(arguments) == 1:
        assert not modules & {"aiohttp", "numpy", "tokenizers", "msgspec", "structlog", "asyncio"}


def test_serving_imports_nothing_that_it_does_not_run(model: Path, tmp_path: Path) -> None:
    """From the start until the server has answered and ended: a stage that imports late would only move the time."""
    process = subprocess.Popen(
        command(["serve", str(model), "--port", "0", "--num-blocks", "64"], tmp_path / "modules"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(installed(BESIDE, tmp_path)), *sys.path))},
    )
    with process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready."):
                url = line.split("--url ")[1].strip()
                answer = [sys.executable, "-m", "streamkv", "chat", "--url", url, "--once", "Hello", "--max-tokens", "4"]
                subprocess.run(answer, check=True, capture_output=True, timeout=LIMIT_S)
                process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0, "".join(lines)
    modules = set(json.loads((tmp_path / "modules").read_text()))
    assert {"transformers.modeling_utils", "streamkv.runner.model_runner", "streamkv.server.app"} <= modules
    assert modules.isdisjoint(NOT_FOR_SERVING)
    assert modules.isdisjoint(BESIDE)


AFTERWARDS = """
import sys
from streamkv.runner.imports import COMPILER, import_transformers
import_transformers()
assert COMPILER not in sys.modules
{between}
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import causal_mask_function, or_masks, sdpa_mask

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
ids = torch.arange(12).reshape(2, 6)
alone = model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])).logits
assert torch.isfinite(alone).all()
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)

# A mask function that looks into a tensor: transformers maps it, with torch's TransformGetItemToIndex.
kinds = torch.tensor([0, 0, 1, 1, 0, 0])
same = or_masks(causal_mask_function, lambda b, h, q, k: kinds[q] == kinds[k])
sizes = dict(batch_size=1, q_length=6, kv_length=6, device="cpu", allow_is_causal_skip=False)
mapped, plain = (sdpa_mask(**sizes, mask_function=same, use_vmap=vmap) for vmap in (True, False))
assert torch.equal(mapped, plain) and not mapped.all()

compiled = []
def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward
fast = torch.compile(model, backend=backend)
torch.testing.assert_close(fast(ids).logits, model(ids).logits)
assert compiled
assert sys.modules[COMPILER].__file__
"""


@pytest.mark.parametrize("between", ["", "import torch._dynamo"], ids=["first use", "imported by hand"])
def test_transformers_and_the_compiler_work_in_the_same_process(between: str) -> None:
    code = AFTERWARDS.format(between=between)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


PLAINLY = """
import sys
import streamkv.runner.imports as imports
{change}
imports.import_transformers()
assert imports.COMPILER not in sys.modules and "transformers.masking_utils" not in sys.modules
import torch
from transformers import LlamaConfig, LlamaForCausalLM
assert sys.modules[imports.COMPILER].__file__
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
assert model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False).shape == (1, 9)
"""


@pytest.mark.parametrize("change", ["imports._unmarked = None", "imports._MASKS = 'torch.another_name'"])
def test_where_transformers_wants_more_of_the_compiler_it_gets_the_real_one(change: str) -> None:
    """Another version may ask for other names."""
    code = PLAINLY.format(change=change)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr

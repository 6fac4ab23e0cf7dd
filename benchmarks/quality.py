"""What rounded weights cost in quality: bfloat16, int8 and int4 of the cpu backend beside float32.

python -m benchmarks.quality [--dialogues 300] [--model-dir DIR] [--quick]

The model in the box reads dialogues of its held-out side (the first ones of seed 1, as `python -m streamkv.demo.evaluate` takes
them); what counts is how it predicts the assistant's words. The second table is the model of `benchmarks.workloads`, with random
weights and tokens. "float32" is the torch backend with the same weights, so the other rows have nothing but rounding in them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer

from benchmarks.report import print_setting, print_table
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.attention import KVSpec, StepTensors
from streamkv.backend_registry import load_backend
from streamkv.demo import model_path
from streamkv.demo.corpus import dialogues
from streamkv.demo.tokenizer import encode
from streamkv.fused import Quantization
from streamkv.logs import configure_logs
from streamkv.runner.hook import KVContext
from streamkv.runner.loader import load_model

__all__ = ["FORMATS", "Format", "Quality", "Reader", "held_out", "measure"]

BLOCK_SIZE: Final = 16
MAX_TOKENS: Final = 4096


@dataclass(frozen=True)
class Format:
    """How weights are kept and computed with."""

    name: str
    backend: str
    dtype: str
    quantization: Quantization | None = None


FORMATS: Final = (
    Format("float32", "torch", "float32"),
    Format("bfloat16", "cpu", "bfloat16"),
    Format("int8", "cpu", "bfloat16", "int8"),
    Format("int4", "cpu", "bfloat16", "int4"),
)
"""The first one is what the others are compared with."""


@dataclass
class Quality:
    """Sums over the positions that count: negative log-likelihood, KL divergence from float32, in nats, and equal favourites."""

    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    count: int = 0

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.loss / self.count)


class Reader:
    """A model in one format, reading one sequence at a time through the paged cache."""

    def __init__(self, folder: Path, kind: Format, *, max_tokens: int = MAX_TOKENS) -> None:
        """Load it. Raises what `load_model` and the backend raise."""
        self._backend, _ = load_backend(kind.backend)
        loaded = load_model(folder, dtype=kind.dtype, quantization=kind.quantization, ops=self._backend.ops)
        self._module = loaded.module
        num_blocks = -(-max_tokens // BLOCK_SIZE)
        self._pool = self._backend.allocate_kv(KVSpec(num_blocks, BLOCK_SIZE, loaded.dtype, loaded.layers))
        self._context = KVContext(self._backend)
        self.vocab_size = loaded.vocab_size

    @torch.inference_mode()
    def predict(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities, float32 [len(token_ids), vocab_size]."""
        size = len(token_ids)
        positions = torch.arange(size)
        self._context.metadata = self._backend.prepare(
            StepTensors(
                query_start=torch.tensor([0, size], dtype=torch.int32),
                seq_lens=torch.tensor([size], dtype=torch.int32),
                block_tables=torch.arange(-(-size // BLOCK_SIZE), dtype=torch.int32)[None],
                slots=positions,
            )
        )
        output = self._module(
            input_ids=torch.tensor([token_ids]), position_ids=positions[None], use_cache=False, streamkv_context=self._context
        )
        return torch.log_softmax(output.logits[0].float(), dim=-1)

    @property
    def num_bytes(self) -> int:
        """Of all weights as they are kept in memory; tied ones that are also packed count twice, because they are there twice."""
        packed: dict[int, Any] = {}
        for module in self._module.modules():
            # Merged layers share one packed weight, which is nobody's child.
            layer = getattr(getattr(module, "merged", None), "packed", module)
            if hasattr(layer, "num_bytes"):
                packed[id(layer)] = layer
        plain = sum(int(parameter.nbytes) for parameter in self._module.parameters())
        return plain + sum(int(layer.num_bytes) for layer in packed.values())


def held_out(count: int) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, whether the assistant says each) of dialogues that the model in the box was not trained on."""
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    for dialogue in islice(dialogues(1, "heldout"), count):
        token_ids, own = encode(tokenizer, dialogue)
        yield token_ids[:MAX_TOKENS], own[:MAX_TOKENS]


def measure(readers: Sequence[Reader], texts: Iterator[tuple[list[int], list[bool]]]) -> list[Quality]:
    """One figure for each reader; the first one is the reference."""
    found = [Quality() for _ in readers]
    for token_ids, counts in texts:
        mask = torch.tensor(counts[1:])
        targets = torch.tensor(token_ids[1:])[mask][:, None]
        exact: torch.Tensor | None = None
        for reader, quality in zip(readers, found, strict=True):
            own = reader.predict(token_ids)[:-1][mask]  # [positions that count, vocab_size]
            exact = own if exact is None else exact
            quality.loss -= float(own.gather(1, targets).sum(dtype=torch.float64))
            quality.kl += float((exact.exp() * (exact - own)).sum(dtype=torch.float64))
            quality.agreed += int((exact.argmax(dim=-1) == own.argmax(dim=-1)).sum())
            quality.count += len(own)
    return found


def _random_texts(count: int, length: int, vocab_size: int) -> Iterator[tuple[list[int], list[bool]]]:
    source = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(3, vocab_size, (length,), generator=source).tolist(), [True] * length


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="quality of quantised weights")
    parser.add_argument("--dialogues", type=int, default=300)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few dialogues, a tiny random model")
    arguments = parser.parse_args()
    configure_logs(level="warning")
    print_setting("streamkv", "torch", "transformers")
    readers = [Reader(model_path(), kind) for kind in FORMATS]
    found = measure(readers, held_out(8 if arguments.quick else arguments.dialogues))
    rows = [
        [*_cells(kind.name, reader, quality), f"{quality.perplexity:.4f}", f"{quality.perplexity / found[0].perplexity:.4f}"]
        for kind, reader, quality in zip(FORMATS, readers, found, strict=True)
    ]
    header = ["weights", "MB", "KL to float32, nats", "same favourite %"]
    print_table(f"the model in the box, {found[0].count:,} tokens", [*header, "perplexity", "to float32"], rows)
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    readers = [Reader(folder, kind) for kind in FORMATS]
    found = measure(readers, _random_texts(2 if arguments.quick else 8, 256, readers[0].vocab_size))
    rows = [_cells(kind.name, reader, quality) for kind, reader, quality in zip(FORMATS, readers, found, strict=True)]
    print_table(f"{folder.name}, random weights, {found[0].count:,} random tokens", header, rows)


def _cells(name: str, reader: Reader, quality: Quality) -> list[str]:
    kl = quality.kl / quality.count
    return [name, f"{reader.num_bytes / 1e6:.1f}", f"{kl:.2e}", f"{100 * quality.agreed / quality.count:.2f}"]


if __name__ == "__main__":
    main()

"""Logits processors of other packages: what one has to offer, and how the ones that the operator names are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from streamkv.entry_points import EntryPointGroup
from streamkv.errors import ConfigError

__all__ = ["PROCESSORS", "LogitsProcessor", "ProcessorSetup", "load_processors"]

PROCESSORS: Final = EntryPointGroup("streamkv.logits_processors", "logits processor", ConfigError)
_MEMBERS: Final = ("check", "admit", "append", "apply")


@dataclass(frozen=True, slots=True)
class ProcessorSetup:
    """What a processor is made with.

    Attributes:
        num_rows: rows are numbered from 0 to num_rows - 1.
        vocab_size: width of the logits.
        device: where the logits lie.
        model_path: the model's folder, for processors that need its tokenizer.
    """

    num_rows: int
    vocab_size: int
    device: torch.device
    model_path: Path


class LogitsProcessor(Protocol):
    """Changes logits of the rows that ask for it; one object serves all of them.

    A row is a request's place in the batch; it belongs to the same request until `admit` gives it to another one. Everything but
    `check` is called in the runner's thread, and what it raises fails the step for all: refuse in `check`.
    """

    def check(self, arguments: Any) -> None:
        """Refuse arguments when a request arrives; called in another thread than the rest, so it reads constants only.

        Raises:
            ValueError: one sentence for the client.
        """

    def admit(self, row: int, arguments: Any, tokens: Sequence[int], num_prompt: int) -> None:
        """A request takes over a row: a new one, or one that was preempted and comes back with its output.

        Args:
            arguments: have passed `check`.
            tokens: prompt and output so far.
            num_prompt: how many of them are prompt; the output of a fork begins where that of its family did.
        """

    def append(self, rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """Each of these rows has got one token more. A row may get one past its end; it is then given away."""

    def apply(self, rows: npt.NDArray[np.int64], logits: torch.Tensor) -> torch.Tensor:
        """Change the logits of the next token. Changes no state: a step that fails is not repeated.

        Args:
            rows: [n], those that asked for it.
            logits: [n, vocab_size] float32 after penalties, bias and masks, before the temperature; may be changed in place.

        Returns:
            [n, vocab_size]; a row must depend on that row alone.
        """


def load_processors(names: Sequence[str], setup: ProcessorSetup) -> dict[str, LogitsProcessor]:
    """Make the processors that the operator named.

    Args:
        names: of entry points, or import strings `package.module:Class`; requests ask for them by the same names.

    Returns:
        By name, in the given order, which is the order in which they are applied.

    Raises:
        ConfigError: unknown name, not importable, or not a logits processor; one sentence says which.
    """
    return {name: _construct(name, PROCESSORS.load(name), setup) for name in names}


def _construct(name: str, factory: Any, setup: ProcessorSetup) -> LogitsProcessor:
    if not callable(factory):
        raise ConfigError(f"logits processor {name!r} is no class but an object of type {type(factory).__name__}")
    try:
        made: LogitsProcessor = factory(setup)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"logits processor {name!r} cannot be made: {error!r}") from error
    missing = [member for member in _MEMBERS if not callable(getattr(made, member, None))]
    if missing:
        raise ConfigError(
            f"logits processor {name!r} is no streamkv.runner.logits_processor.LogitsProcessor: it lacks {', '.join(missing)}"
        )
    return made

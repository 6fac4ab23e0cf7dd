"""Small steps without their Python: a pass of each size is recorded when it comes again, and then run from the recording.

A backend whose `ops` can record offers it; for transformers' modules a pass is the same calls in the same order however often
it runs. A recording is trusted after it has given the same bits as the model's own pass twice, for two different steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch

__all__ = ["Recordings"]

_MOST_TOKENS: Final = 64  # beyond, Python is a small part of a step
_KEPT: Final = 32  # sizes; each holds a step's buffers, the least recently used goes first
_REMEMBERED: Final = 256  # sizes that were met once: that of a prompt's last piece may never come again
_PROOFS: Final = 2
_MOST_DETOURS: Final = 8  # steps in a row that went through Python although there was a recording

log = structlog.get_logger(__name__)

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class _Kept:
    recorded: Any
    proofs: int = 0


class Recordings:
    """Recordings of one model over one pool, by number of tokens and of rows whose logits are wanted."""

    def __init__(self, backend: Any, run: Pass) -> None:
        self._backend, self._run = backend, run
        self._kept: OrderedDict[tuple[int, int], _Kept] = OrderedDict()
        self._met: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._detours = 0
        self.off: str | None = None
        """Why nothing is recorded (any more)."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(tokens, rows with logits) of every recording."""
        return list(self._kept)

    def run(self, inputs: Inputs, metadata: Any) -> torch.Tensor:
        """The pass's result, by recording where there is one. Overwritten by the next call.

        Args:
            inputs: token ids and positions [1, num_tokens], rows whose logits are wanted [num_wanted].
            metadata: of the step, as the backend has prepared it.
        """
        key = (inputs[0].shape[1], len(inputs[2]))
        if self.off is not None or key[0] > _MOST_TOKENS:
            return self._run(*inputs)
        kept = self._kept.get(key)
        if kept is None:
            return self._record(key, inputs, metadata) if self._meets_again(key) else self._run(*inputs)
        self._kept.move_to_end(key)
        result = self._replay(kept, inputs, metadata)
        if self.off is not None:
            return self._run(*inputs)
        if result is None:
            self._detours += 1
            if self._detours > _MOST_DETOURS:
                self._stop("the model's Python decides by what it computes")
            return self._run(*inputs)
        self._detours = 0
        if kept.proofs < _PROOFS:
            return self._prove(kept, result.clone(), self._run(*inputs))
        return result

    def _meets_again(self, key: tuple[int, int]) -> bool:
        again = key in self._met
        self._met[key] = None
        self._met.move_to_end(key)
        if len(self._met) > _REMEMBERED:
            self._met.popitem(last=False)
        return again

    def _record(self, key: tuple[int, int], inputs: Inputs, metadata: Any) -> torch.Tensor:
        output: torch.Tensor
        try:
            output, recorded = self._backend.ops.record(self._run, inputs)
        except Exception:  # any: the modes that look on forbid what the model does, or it fails by itself, and then again
            output = self._run(*inputs)
            log.warning("recording_failed", exc_info=True)
            self._stop("the model cannot be looked on")
            return output
        if recorded is None:
            self._stop("the model's Python reads what it computes")
            return output
        kept = self._kept[key] = _Kept(recorded)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        first = output.clone()
        again = self._replay(kept, inputs, metadata)
        return first if again is None else self._prove(kept, again, first)

    def _replay(self, kept: _Kept, inputs: Inputs, metadata: Any) -> torch.Tensor | None:
        """The recording's result; None if this step has to go through Python. What it has written by then is written again."""
        try:
            result: torch.Tensor | None = self._backend.replay(kept.recorded, inputs, metadata)
        except Exception:  # any: the model itself can still answer
            log.warning("recording_failed", exc_info=True)
            self._stop("a recording cannot be run")
            return None
        return result

    def _prove(self, kept: _Kept, again: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Compare what a recording gave with the model's own result, which is returned."""
        if torch.equal(again, own):
            kept.proofs += 1
        elif bool(own.isfinite().all()):  # NaN equals nothing: a faulty request proves nothing
            self._stop("a recording gave other numbers than the model")
        return own

    def _stop(self, reason: str) -> None:
        self.off = reason
        self._kept.clear()
        log.info("steps_not_recorded", reason=reason)

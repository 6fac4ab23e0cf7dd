"""Small steps without their Python: a pass of each size is recorded when it comes again, and then run from the recording.

A backend that is a `Recorder` offers it: the cpu backend writes down native calls, the cuda backend makes CUDA graphs. For
transformers' modules a pass is the same calls in the same order however often it runs. A recording is trusted after it has given
the same numbers as the model's own pass twice, for two different steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch

from streamkv.attention import Recorder

__all__ = ["Recordings"]

_KEPT: Final = 64  # sizes; each holds a step's buffers, the least recently used goes first
_REMEMBERED: Final = 256  # sizes that were met once: that of a prompt's last piece may never come again
_PROOFS: Final = 2
_CLOSE: Final = 2.0**-5  # of a row's largest logit: another token's logits are further away
_MOST_DETOURS: Final = 8  # steps in a row that went through Python although there was a recording

log = structlog.get_logger(__name__)

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Key = tuple[int, int, Hashable]


@dataclass(slots=True)
class _Kept:
    recorded: Any
    proofs: int = 0


class Recordings:
    """Recordings of one model, by number of tokens, of rows whose logits are wanted, and what the backend goes by."""

    def __init__(self, backend: Recorder, run: Pass) -> None:
        self._backend, self._run = backend, run
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._met: OrderedDict[_Key, None] = OrderedDict()
        self._detours = 0
        self.off: str | None = None
        """Why nothing is recorded (any more)."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(tokens, rows with logits) of every recording."""
        return [key[:2] for key in self._kept]

    def padded(self, num_tokens: int) -> int:
        """How many tokens a pass should have that needs `num_tokens`."""
        return (self.off is None and self._backend.recorded_size(num_tokens)) or num_tokens

    def ahead(self, inputs: Inputs, metadata: Any) -> bool:
        """Record a pass whose result nobody wants, before one like it comes; whether that was still to be done."""
        key = self._key(inputs, metadata)
        if key is None or key in self._kept:
            return False
        self._met[key] = None
        self._record(key, inputs, metadata)
        return True

    def run(self, inputs: Inputs, metadata: Any) -> torch.Tensor:
        """The pass's result, by recording where there is one. Overwritten by the next call.

        Args:
            inputs: token ids and positions [1, num_tokens], rows whose logits are wanted [num_wanted].
            metadata: of the step, as the backend has prepared it.
        """
        key = self._key(inputs, metadata)
        if key is None:
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

    def _key(self, inputs: Inputs, metadata: Any) -> _Key | None:
        """None = such a pass is not recorded."""
        num_tokens = inputs[0].shape[1]
        if self.off is not None or self._backend.recorded_size(num_tokens) != num_tokens:
            return None
        own = self._backend.recording_key(metadata)
        return None if own is None else (num_tokens, len(inputs[2]), own)

    def _meets_again(self, key: _Key) -> bool:
        again = key in self._met
        self._met[key] = None
        self._met.move_to_end(key)
        if len(self._met) > _REMEMBERED:
            self._met.popitem(last=False)
        return again

    def _record(self, key: _Key, inputs: Inputs, metadata: Any) -> torch.Tensor:
        output: torch.Tensor
        try:
            output, recorded = self._backend.record(self._run, inputs)
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
        if _same(again, own):
            kept.proofs += 1
        elif bool(own.isfinite().all()):  # NaN equals nothing: a faulty request proves nothing
            self._stop("a recording gave other numbers than the model")
        return own

    def _stop(self, reason: str) -> None:
        self.off = reason
        self._kept.clear()
        log.info("steps_not_recorded", reason=reason)


def _same(again: torch.Tensor, own: torch.Tensor) -> bool:
    """Equal to the bit on a processor. A GPU's libraries may add in another order within a graph."""
    if torch.equal(again, own):
        return True
    again, own = again.float(), own.float()
    return again.is_cuda and bool(((again - own).abs() <= _CLOSE * own.abs().amax(dim=-1, keepdim=True)).all())

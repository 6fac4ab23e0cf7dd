"""What some requests want of their prompt tokens: log-probabilities (scores, echo) and one pooled vector (embeddings).

Both share steps with generation. A prompt comes in chunks: position p's logits tell the log-probability of token p + 1, which
may lie in the next chunk, so that the prompt itself is kept; a mean is a running sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streamkv.runner.hook import Probe
from streamkv.runner.params import RowParams
from streamkv.runner.sampling_logprobs import PositionLogprobs, launch_logprobs
from streamkv.runner.transfer import upload
from streamkv.sampling_params import PromptLogprobs

__all__ = ["HiddenTap", "LaunchedPrompts", "PromptReader", "Range"]


@dataclass(frozen=True, slots=True)
class Range:
    """Positions start .. end - 1 of entry `entry`, whose logits are wanted; `first` is the packed row of position `start`."""

    entry: int
    row: int
    start: int
    end: int
    first: int


@dataclass(frozen=True, slots=True)
class LaunchedPrompts:
    """Log-probabilities of prompt tokens that nobody has waited for yet: of each range its entry, its first token's position."""

    parts: list[tuple[int, int, PositionLogprobs]]

    def read(self) -> dict[int, PromptLogprobs]:
        """By entry; waits for the device."""
        return {entry: PromptLogprobs(first, tuple(told.read())) for entry, first, told in self.parts}


class PromptReader:
    """Owns the wishes of the rows that have some; all others cost one look into an empty dictionary."""

    def __init__(self) -> None:
        self._scored: dict[int, RowParams] = {}
        self._pooled: dict[int, RowParams] = {}
        self._sums: dict[int, torch.Tensor] = {}  # [hidden_size] float32, of the positions computed so far

    def admit(self, row: int, params: RowParams) -> None:
        """A request takes over a row."""
        for wishes, wanted in ((self._scored, params.prompt_logprobs is not None), (self._pooled, params.pooling is not None)):
            wishes.pop(row, None)
            if wanted:
                wishes[row] = params
        self._sums.pop(row, None)

    @property
    def pools(self) -> bool:
        """True if some row wants a vector, so that hidden states must be kept."""
        return bool(self._pooled)

    def ranges(self, rows: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[Range]:
        """Positions of this step that tell the log-probability of a prompt token which has not been reported."""
        if not self._scored:
            return []
        found: list[Range] = []
        firsts = np.cumsum(counts) - counts
        for entry, row in enumerate(rows.tolist()):
            params = self._scored.get(row)
            if params is None:
                continue
            chunk, count = int(starts[entry]), int(counts[entry])
            # Position p tells of token p + 1: the last prompt position tells of no prompt token.
            start = max(chunk, params.reported - 1)
            end = min(chunk + count, params.num_prompt - 1)
            if start < end:
                found.append(Range(entry, row, start, end, int(firsts[entry]) + start - chunk))
        return found

    def launch_logprobs(self, found: list[Range], logits: torch.Tensor) -> LaunchedPrompts:
        """Work on the logits of all ranges, one after the other. Waits for nothing on a GPU.

        Args:
            logits: [sum of the ranges' lengths, vocab_size]; not needed any more once this has returned.
        """
        parts: list[tuple[int, int, PositionLogprobs]] = []
        at = 0
        for part in found:
            params = self._scored[part.row]
            length = part.end - part.start
            (tokens,) = upload([np.array(params.tokens[part.start + 1 : part.end + 1], np.int64)], logits.device)
            told = launch_logprobs(logits[at : at + length], tokens, params.prompt_logprobs or 0)
            parts.append((part.entry, part.start + 1, told))
            at += length
        return LaunchedPrompts(parts)

    def pool(
        self,
        rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        hidden: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Take this step's hidden states in; the last thing of a step, because a step that fails must leave no trace.

        Args:
            hidden: [num_tokens, hidden_size], after the model's last norm.

        Returns:
            By entry, for prompts that are complete: [hidden_size] float32, on the model's device.
        """
        result: dict[int, torch.Tensor] = {}
        firsts = np.cumsum(counts) - counts
        for entry, row in enumerate(rows.tolist()):
            params = self._pooled.get(row)
            if params is None:
                continue
            first, count, start = int(firsts[entry]), int(counts[entry]), int(starts[entry])
            chunk = hidden[first : first + count].float()
            complete = start + count == params.num_prompt
            if params.pooling == "last":
                if complete:
                    result[entry] = chunk[-1].clone()
                continue
            total = chunk.sum(dim=0)
            if start:
                total += self._sums[row]
            self._sums[row] = total
            if complete:
                result[entry] = total / params.num_prompt
        return result


class HiddenTap:
    """Catches the last hidden states on their way to the vocabulary projection."""

    def __init__(self, module: Any) -> None:
        """Listen at the model's decoder; `width` is 0 if nothing comes by there that the projection then reads."""
        self._wanted = False
        self._caught: torch.Tensor | None = None
        module.get_decoder().register_forward_hook(self._catch)
        self.width = self._try(module)

    def _catch(self, _module: Any, _arguments: Any, output: Any) -> None:
        if self._wanted:
            self._wanted = False  # one pass only: also if that pass fails further on
            self._caught = output[0]  # last_hidden_state comes first in every output of transformers

    def _try(self, module: Any) -> int:
        """One forward pass: what was caught must be what the vocabulary projection was given."""
        read: list[torch.Tensor] = []
        handle = module.get_output_embeddings().register_forward_pre_hook(lambda _module, arguments: read.append(arguments[0]))
        ids = torch.zeros((1, 1), dtype=torch.long, device=module.device)
        try:
            self.expect()
            with torch.inference_mode():
                module(input_ids=ids, position_ids=ids, use_cache=False, streamkv_context=Probe())
            caught = self.take()
        finally:
            handle.remove()
        same_size = caught is not None and len(read) == 1 and read[0].numel() == caught.numel()
        fits = caught is not None and same_size and torch.equal(read[0].reshape(caught.shape), caught)
        return int(caught.shape[-1]) if caught is not None and fits else 0

    def expect(self) -> None:
        """Keep the hidden states of the next forward pass."""
        self._wanted = True

    def take(self) -> torch.Tensor | None:
        """[num_tokens, hidden_size], or None if none came by."""
        caught, self._caught = self._caught, None
        return None if caught is None else caught.reshape(-1, caught.shape[-1])

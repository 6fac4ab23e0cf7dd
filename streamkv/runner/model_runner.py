"""Carries out steps: tables, packed tensors, one forward pass, sampling.

Everything here runs in the runner's one thread. A row is a request's fixed place in the tables below; what a step samples stays
in `last_token`, so that the next step can name it as its input before anybody outside has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from streamkv.attention import AttentionBackend, KVPool, StepTensors
from streamkv.core.step import PENDING, Sampled, Step
from streamkv.runner.hook import KVContext
from streamkv.runner.loader import LoadedModel
from streamkv.runner.logits_processor import LogitsProcessor
from streamkv.runner.params import RowExtra, RowParams
from streamkv.runner.prompt_reader import HiddenTap, PromptReader, Range
from streamkv.runner.recordings import Recordings
from streamkv.runner.sampling_tables import RowSampler

__all__ = ["ModelRunner", "SkippedStepError"]


class SkippedStepError(RuntimeError):
    """The step was not computed because an earlier one failed; its tables and copies were taken over."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step in arrays.

    Attributes:
        rows, starts, counts: [num_seqs].
        tokens, positions: [num_tokens].
        sampled: [num_sampled], entries that sample; one with drafts comes once for each of its tokens.
        places: [num_sampled], packed rows whose logits are sampled from.
    """

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


class ModelRunner:
    """Owns the model, the pool and the row tables. Not thread-safe."""

    def __init__(
        self,
        model: LoadedModel,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        max_num_seqs: int,
        max_model_len: int,
        processors: Mapping[str, LogitsProcessor] | None = None,
        tap: HiddenTap | None = None,
        poison: bool = False,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up empty tables.

        Args:
            on_pass: called when a forward pass is about to begin.
            processors: logits processors that requests may ask for, by name.
            tap: where the model's hidden states can be had; None = no request asks for a vector.
            poison: debug: fill every newly handed out block with NaN, so that a read of an unwritten slot is seen.
        """
        self._model = model
        self._backend = backend
        self._pool = pool
        self._poison = poison
        self._on_pass = on_pass
        self._block_size = pool.spec.block_size
        self._context = KVContext(backend)
        blocks_per_row = -(-max_model_len // self._block_size)
        self._tables: npt.NDArray[np.int32] = np.zeros((max_num_seqs, blocks_per_row), np.int32)
        self._last_token: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._sampler = RowSampler(
            num_rows=max_num_seqs,
            max_len=max_model_len,
            vocab_size=model.vocab_size,
            device=model.device,
            processors=processors or {},
        )
        self._prompts = PromptReader()
        self._tap = tap
        self._failed = False
        records = hasattr(backend, "replay") and backend.ops is not None and model.dtype is backend.ops.dtype
        self._recordings = Recordings(backend, self._ask_model) if records else None

    @property
    def pool(self) -> KVPool:
        """The KV pool that steps write."""
        return self._pool

    def resume(self) -> None:
        """Compute again after a failed step; called once its successors have come back skipped."""
        self._failed = False

    @torch.inference_mode()
    def run(self, step: Step, params: Mapping[int, RowParams]) -> Sampled:
        """Carry out one step.

        Args:
            step: steps come in the order of their ids.
            params: for every admitted row how it is sampled.

        Raises:
            SkippedStepError: an earlier step failed and `resume` was not called yet.
            Exception: whatever the model raised; later steps are skipped until `resume`.
        """
        self._take_over(step, params)
        if self._failed:
            raise SkippedStepError(f"step {step.id} was skipped")
        try:
            return self._compute(step)
        except BaseException:
            self._failed = True
            raise

    def _take_over(self, step: Step, params: Mapping[int, RowParams]) -> None:
        """Tables, clears and copies: also for a step that is then skipped, because the next one builds on them."""
        for row, _ in step.admitted:
            self._sampler.admit(row, params[row])
            self._prompts.admit(row, params[row])
        for row, first, ids in step.tables:
            self._tables[row, first : first + len(ids)] = ids
        if step.clears:
            self._pool.fill(step.clears, 0.0)
        if step.copies:
            self._pool.copy(step.copies)
        if self._poison:
            self._poison_new_blocks(step)

    def _poison_new_blocks(self, step: Step) -> None:
        filled = {target for _, target in step.copies}
        admitted = {row for row, _ in step.admitted}
        starts = dict(zip(step.rows, step.starts, strict=True))
        new: list[int] = []
        for row, first, ids in step.tables:
            # The table of an admitted row begins with blocks that it shares, and they hold what others wrote.
            shared = -(-starts[row] // self._block_size) if row in admitted and first == 0 else 0
            new += [block for block in ids[shared:] if block not in filled]
        if new:
            self._pool.fill(new, float("nan"))

    def _compute(self, step: Step) -> Sampled:
        batch = self._pack(step)
        ranges = self._prompts.ranges(batch.rows, batch.starts, batch.counts)
        keep = batch.places  # packed rows whose logits are wanted: first those that sample
        if ranges:
            keep = np.concatenate([keep, *(np.arange(part.first, part.first + part.end - part.start) for part in ranges)])
        if self._prompts.pools and self._tap is not None:
            self._tap.expect()
        self._on_pass()
        logits = self._forward(batch.tokens, batch.positions, keep)
        return self._finish(batch, ranges, logits)

    def _pack(self, step: Step) -> _Batch:
        """The step as packed arrays; the backend is told of it."""
        rows = np.asarray(step.rows, np.int64)  # [num_seqs]
        starts = np.asarray(step.starts, np.int64)
        counts = np.asarray(step.counts, np.int64)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        entry = np.repeat(np.arange(len(rows)), counts)  # [num_tokens], which sequence a token belongs to
        positions = np.arange(len(entry)) - query_start[entry] + starts[entry]  # [num_tokens]
        tokens = np.asarray(step.tokens, np.int64)  # [num_tokens]
        pending = tokens == PENDING
        if pending.any():
            tokens = np.where(pending, self._last_token[rows[entry]], tokens)
        size = self._block_size
        blocks = self._tables[rows[entry], positions // size].astype(np.int64)
        seq_lens = (starts + counts).astype(np.int32)
        width = -(-int(seq_lens.max()) // size)
        self._context.metadata = self._backend.prepare(
            StepTensors(
                query_start=torch.from_numpy(query_start),
                seq_lens=torch.from_numpy(seq_lens),
                block_tables=torch.from_numpy(self._tables[rows, :width]),
                slots=torch.from_numpy(blocks * size + positions % size),
            )
        )
        samples = np.asarray(step.samples, np.int64)
        sampled = np.repeat(np.arange(len(rows)), samples)
        # The last `samples` packed rows of each entry: its end, less how many of its own come behind.
        behind = np.cumsum(samples)[sampled] - np.arange(len(sampled))
        return _Batch(rows, starts, counts, tokens, positions, sampled, query_start[1:].astype(np.int64)[sampled] - behind)

    def _forward(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        keep: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """[len(keep), vocab_size]; at least one row is computed, because transformers reads an empty list as all."""
        device = self._model.device
        wanted = torch.from_numpy(keep) if len(keep) else torch.zeros(1, dtype=torch.long)
        inputs = (torch.from_numpy(tokens)[None].to(device), torch.from_numpy(positions)[None].to(device), wanted.to(device))
        if self._recordings is not None and not self._prompts.pools:
            logits = self._recordings.run(inputs, self._context.metadata)
        else:
            logits = self._ask_model(*inputs)
        return logits[: len(keep)]

    def _ask_model(self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        output = self._model.module(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            streamkv_context=self._context,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _finish(self, batch: _Batch, ranges: list[Range], logits: torch.Tensor) -> Sampled:
        """Sample, and read what else is wanted. State changes last: a step that fails before leaves its rows as they were."""
        sampled = batch.sampled
        rows = batch.rows[sampled]
        own, of_prompts = logits[: len(sampled)], logits[len(sampled) :]
        result: list[tuple[int, ...]] = [()] * len(batch.rows)
        ids: list[int] = []
        bad: set[int] = set()  # indices into `sampled`
        extras: dict[int, RowExtra] = {}
        if len(sampled):
            chosen, finite = self._choose(rows, batch.positions[batch.places] + 1, own)
            bad.update((~finite).nonzero().flatten().tolist())
            for index, value in self._sampler.logprobs(rows, own, chosen, bad).items():
                extras[int(sampled[index])] = RowExtra(value)
            ids = chosen.tolist()
        for entry, prompt in self._prompts.logprobs(ranges, of_prompts).items():
            extras[entry] = replace(extras.get(entry, RowExtra()), prompt_logprobs=prompt)
        kept = _kept(batch, ids)
        failed = {int(sampled[index]) for index in bad if kept[index]}
        for entry, vector in self._pooled(batch).items():
            extras[entry] = replace(extras.get(entry, RowExtra()), embedding=vector.numpy().astype("<f4").tobytes())
            if not bool(torch.isfinite(vector).all()):
                failed.add(entry)
        for entry, token, keep in zip(sampled.tolist(), ids, kept, strict=True):
            if keep:
                result[entry] += (token,)
        self._take(batch, result)
        return Sampled(result, frozenset(failed), extras)

    def _take(self, batch: _Batch, result: list[tuple[int, ...]]) -> None:
        """What was sampled becomes part of its rows; most have one token, those behind right drafts more."""
        nth = 0
        while entries := [entry for entry, tokens in enumerate(result) if len(tokens) > nth]:
            rows, ids = batch.rows[entries], [result[entry][nth] for entry in entries]
            self._sampler.append(rows, ids)
            self._last_token[rows] = ids
            nth += 1

    def _choose(
        self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token per row, and whether its logits are finite."""
        ops = self._backend.ops
        if ops is not None and logits.dtype is ops.dtype and self._sampler.takes_the_most_probable(rows):
            return ops.most_probable(logits)
        # One reduction shows NaN and Inf anywhere in a row: a sum of finite logits stays far from float32's limit.
        finite = torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))
        return self._sampler.sample(rows, positions, logits), finite

    def _pooled(self, batch: _Batch) -> dict[int, torch.Tensor]:
        if not self._prompts.pools or self._tap is None:
            return {}
        hidden = self._tap.take()
        assert hidden is not None, "the model's decoder was not asked"
        return self._prompts.pool(batch.rows, batch.starts, batch.counts, hidden)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """The worst step: `num_tokens` tokens of one sequence in the first blocks, every position's logits, nothing kept."""
        size = self._block_size
        num_tokens = min(num_tokens, self._tables.shape[1] * size, self._pool.spec.num_blocks * size)
        positions = np.arange(num_tokens, dtype=np.int64)
        self._context.metadata = self._backend.prepare(
            StepTensors(
                query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
                seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
                block_tables=torch.arange(-(-num_tokens // size), dtype=torch.int32)[None],
                slots=torch.from_numpy(positions),
            )
        )
        self._forward(np.zeros(num_tokens, np.int64), positions, positions)


def _kept(batch: _Batch, ids: list[int]) -> list[bool]:
    """Which of the sampled tokens count: those that stand behind nothing but what was sampled before them, drafts or not."""
    kept: list[bool] = []
    for index, (entry, place) in enumerate(zip(batch.sampled.tolist(), batch.places.tolist(), strict=True)):
        first = index == 0 or batch.sampled[index - 1] != entry
        kept.append(first or (kept[-1] and ids[index - 1] == batch.tokens[place]))
    return kept

"""Carries out steps: tables, packed tensors, one forward pass, sampling.

Everything here runs in the runner's one thread. A row is a request's fixed place in the tables below; what a step samples stays
in `last_token` on the device, so that the next step can name it as its input before anybody outside has seen it.

    launch(n)       queues the step's computation; on a GPU it waits for nothing
    launch(n + 1)   on a processor the result of n is collected before its forward pass, on a GPU behind it
    collect(n)      waits for the tokens of n, and makes them part of their rows

A step whose sampling depends on what was sampled before (penalties, processors) has the step before it collected first.
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
from streamkv.runner.transfer import HostCopy, upload

__all__ = ["Launched", "ModelRunner", "SkippedStepError"]


class SkippedStepError(RuntimeError):
    """The step was not computed because an earlier one failed; its tables and copies were taken over."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step in arrays.

    Attributes:
        rows, tenures, starts, counts: [num_seqs]; whose the rows were is told by their tenures.
        tokens, positions: [num_tokens]; a token may be `PENDING`.
        token_rows: [num_tokens], the row that each token belongs to.
        sampled: [num_sampled], entries that sample; one with drafts comes once for each of its tokens.
        places: [num_sampled], packed rows whose logits are sampled from.
    """

    step_id: int
    rows: npt.NDArray[np.int64]
    tenures: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    token_rows: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens may still be on their way; `streamkv.engine.thread.Pending`.

    Attributes:
        tokens: [num_sampled] ids, and whether the logits were finite.
        extras, failed: as `Sampled`, as far as they are known.
    """

    runner: ModelRunner
    batch: _Batch
    tokens: HostCopy
    extras: dict[int, RowExtra]
    failed: set[int]

    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return self.tokens.ready()

    def collect(self) -> Sampled:
        """`ModelRunner.collect`."""
        return self.runner.collect(self)


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
        late: bool | None = None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up empty tables.

        Args:
            on_pass: called in a launch when the step before may be collected.
            late: whether that is behind the forward pass and not before it; None = on a GPU.
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
        self._tenures: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)  # how often a row was admitted to
        self._remembers: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)  # rows that need their history to sample
        self._last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=model.device)
        self._late = model.device.type == "cuda" if late is None else late
        self._sampler = RowSampler(
            num_rows=max_num_seqs,
            max_len=max_model_len,
            vocab_size=model.vocab_size,
            device=model.device,
            processors=processors or {},
            ops=backend.ops,
        )
        self._prompts = PromptReader()
        self._tap = tap
        self._failed_at: int | None = None  # the step that failed
        records = hasattr(backend, "replay") and backend.ops is not None and model.dtype is backend.ops.dtype
        self._recordings = Recordings(backend, self._ask_model) if records else None

    @property
    def pool(self) -> KVPool:
        """The KV pool that steps write."""
        return self._pool

    def resume(self) -> None:
        """Compute again after a failed step; called once its successors have come back skipped."""
        self._failed_at = None

    def run(self, step: Step, params: Mapping[int, RowParams]) -> Sampled:
        """Launch one step, and collect it."""
        return self.launch(step, params).collect()

    @torch.inference_mode()
    def launch(self, step: Step, params: Mapping[int, RowParams]) -> Launched:
        """Carry out one step, as far as the host has to: on a GPU its tokens are still to come.

        Args:
            step: steps come in the order of their ids.
            params: for every admitted row how it is sampled.

        Raises:
            SkippedStepError: an earlier step failed and `resume` was not called yet.
            Exception: whatever the model raised; later steps are skipped until `resume`.
        """
        self._take_over(step, params)
        try:
            self._see_that_none_failed(step.id)
            return self._compute(step)
        except SkippedStepError:
            raise
        except BaseException:
            self._failed_at = step.id
            raise

    def _see_that_none_failed(self, step_id: int) -> None:
        """Raise SkippedStepError if an earlier step has."""
        if self._failed_at is not None and self._failed_at < step_id:
            raise SkippedStepError(f"step {step_id} was skipped")

    def _take_over(self, step: Step, params: Mapping[int, RowParams]) -> None:
        """Tables, clears and copies: also for a step that is then skipped, because the next one builds on them."""
        for row, _ in step.admitted:
            self._sampler.admit(row, params[row])
            self._prompts.admit(row, params[row])
            self._tenures[row] += 1
            self._remembers[row] = params[row].sampling.needs_history
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

    def _compute(self, step: Step) -> Launched:
        batch = self._pack(step)
        ranges = self._prompts.ranges(batch.rows, batch.starts, batch.counts)
        keep = batch.places  # packed rows whose logits are wanted: first those that sample
        if ranges:
            keep = np.concatenate([keep, *(np.arange(part.first, part.first + part.end - part.start) for part in ranges)])
        if self._prompts.pools and self._tap is not None:
            self._tap.expect()
        late = self._late and not self._remembers[batch.rows[batch.sampled]].any()
        if not late:
            self._on_pass()
            self._see_that_none_failed(step.id)
        launched = self._finish(batch, ranges, self._forward(batch.tokens, batch.positions, keep, batch.token_rows))
        if late:
            self._on_pass()
        return launched

    def _pack(self, step: Step) -> _Batch:
        """The step as packed arrays; the backend is told of it."""
        rows = np.asarray(step.rows, np.int64)  # [num_seqs]
        starts = np.asarray(step.starts, np.int64)
        counts = np.asarray(step.counts, np.int64)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        entry = np.repeat(np.arange(len(rows)), counts)  # [num_tokens], which sequence a token belongs to
        positions = np.arange(len(entry)) - query_start[entry] + starts[entry]  # [num_tokens]
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
        return _Batch(
            step_id=step.id,
            rows=rows,
            tenures=self._tenures[rows],
            starts=starts,
            counts=counts,
            tokens=np.asarray(step.tokens, np.int64),
            positions=positions,
            token_rows=rows[entry],
            sampled=sampled,
            places=query_start[1:].astype(np.int64)[sampled] - behind,
        )

    def _forward(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        keep: npt.NDArray[np.int64],
        token_rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """[len(keep), vocab_size]; at least one row is computed, because transformers reads an empty list as all."""
        wanted = keep if len(keep) else np.zeros(1, np.int64)
        ids, places, kept, rows = upload([tokens, positions, wanted, token_rows], self._model.device)
        if (tokens == PENDING).any():
            ids = torch.where(ids == PENDING, self._last_token[rows], ids)
        inputs = (ids[None], places[None], kept)
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

    def _finish(self, batch: _Batch, ranges: list[Range], logits: torch.Tensor) -> Launched:
        """Sample, and read what else is wanted. State changes last: a step that fails before leaves its rows as they were."""
        sampled = batch.sampled
        rows = batch.rows[sampled]
        own, of_prompts = logits[: len(sampled)], logits[len(sampled) :]
        extras = {
            entry: RowExtra(prompt_logprobs=told)
            for entry, told in self._prompts.launch_logprobs(ranges, of_prompts).read().items()
        }
        chosen: torch.Tensor | None = None
        copy = HostCopy()
        if len(sampled):
            chosen, finite = self._sampler.sample(rows, batch.positions[batch.places] + 1, own)
            copy = HostCopy(chosen, finite)
            bad = set((~finite).nonzero().flatten().tolist())
            for index, value in self._sampler.launch_logprobs(rows, own, chosen).read(bad).items():
                entry = int(sampled[index])
                extras[entry] = replace(extras.get(entry, RowExtra()), logprobs=value)
        failed: set[int] = set()
        for entry, vector in self._pooled(batch).items():
            extras[entry] = replace(extras.get(entry, RowExtra()), embedding=vector.cpu().numpy().astype("<f4").tobytes())
            if not bool(torch.isfinite(vector).all()):
                failed.add(entry)
        if chosen is not None:
            self._remember(batch, chosen)
        return Launched(self, batch, copy, extras, failed)

    def _remember(self, batch: _Batch, chosen: torch.Tensor) -> None:
        """Let the next step find what rows have sampled. Drafts are left out: a step after them knows what they came to."""
        single = np.flatnonzero(np.bincount(batch.sampled, minlength=len(batch.rows))[batch.sampled] == 1)
        if len(single) == len(chosen):
            (rows,) = upload([batch.rows[batch.sampled]], chosen.device)
        else:
            places, rows = upload([single, batch.rows[batch.sampled[single]]], chosen.device)
            chosen = chosen[places]
        self._last_token.index_copy_(0, rows, chosen)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> Sampled:
        """What a step has sampled, once it is there.

        Raises:
            SkippedStepError: an earlier step has failed meanwhile.
            Exception: the device has failed; later steps are skipped until `resume`.
        """
        batch, extras = launched.batch, launched.extras
        sampled = batch.sampled
        self._see_that_none_failed(batch.step_id)
        try:
            ids, finite = (copy.tolist() for copy in launched.tokens.wait()) if len(sampled) else ([], [])
        except BaseException:
            self._failed_at = batch.step_id
            raise
        kept = _kept(batch, ids)
        failed = launched.failed | {int(sampled[index]) for index, good in enumerate(finite) if kept[index] and not good}
        result: list[tuple[int, ...]] = [()] * len(batch.rows)
        for entry, token, keep in zip(sampled.tolist(), ids, kept, strict=True):
            if keep:
                result[entry] += (token,)
        self._take(batch, result)
        return Sampled(result, frozenset(failed), extras)

    def _take(self, batch: _Batch, result: list[tuple[int, ...]]) -> None:
        """What was sampled becomes part of its rows, if they still are whose they were; most have one token, or none."""
        own = batch.tenures == self._tenures[batch.rows]
        nth = 0
        while entries := [entry for entry, tokens in enumerate(result) if len(tokens) > nth and own[entry]]:
            self._sampler.append(batch.rows[entries], [result[entry][nth] for entry in entries])
            nth += 1

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
        self._forward(np.zeros(num_tokens, np.int64), positions, positions, np.zeros(num_tokens, np.int64))


def _kept(batch: _Batch, ids: list[int]) -> list[bool]:
    """Which of the sampled tokens count: those that stand behind nothing but what was sampled before them, drafts or not."""
    kept: list[bool] = []
    for index, (entry, place) in enumerate(zip(batch.sampled.tolist(), batch.places.tolist(), strict=True)):
        first = index == 0 or batch.sampled[index - 1] != entry
        kept.append(first or (kept[-1] and ids[index - 1] == batch.tokens[place]))
    return kept

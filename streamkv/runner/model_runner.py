"""Carries out steps: tables, packed tensors, one forward pass, sampling.

Everything here runs in the runner's one thread. A row is a request's fixed place in the tables below; what a step samples stays
in `last_token` on the device, so that the next step can name it as its input before anybody outside has seen it.

    launch(n)       queues the step's computation; on a GPU it waits for nothing
    launch(n + 1)   on a processor the result of n is collected before its forward pass, on a GPU behind it
    collect(n)      waits for the tokens of n, and makes them part of their rows

A step whose sampling depends on what was sampled before (penalties, processors) has the step before it collected first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from streamkv.attention import AttentionBackend, KVPool, Recorder, StepTensors
from streamkv.core.step import PENDING, Sampled, Step
from streamkv.runner.faults import DeviceLostError
from streamkv.runner.hook import KVContext
from streamkv.runner.host_blocks import HostBlocks
from streamkv.runner.loader import LoadedModel
from streamkv.runner.logits_processor import LogitsProcessor
from streamkv.runner.packing import Batch, kept, pack, padded
from streamkv.runner.params import RowExtra, RowParams
from streamkv.runner.prompt_reader import HiddenTap, LaunchedPrompts, PromptReader, Range
from streamkv.runner.recordings import Recordings
from streamkv.runner.sampling_tables import LaunchedLogprobs, RowSampler
from streamkv.runner.transfer import HostCopy, upload
from streamkv.sampling_params import Sampling

__all__ = ["Launched", "ModelRunner", "SkippedStepError"]

_DEAREST: Final = Sampling(
    max_tokens=1, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, logprobs=20
)
"""Every table and every pass over the vocabulary."""


class SkippedStepError(RuntimeError):
    """The step was not computed because an earlier one failed; its tables and copies were taken over."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens may still be on their way; `streamkv.engine.thread.Pending`.

    Attributes:
        tenures: [num_seqs], whose the batch's rows are.
        tokens: [num_sampled] ids, and whether the logits were finite.
        told: log-probabilities of them.
        of_prompts: the same of prompt tokens, by entry.
        pooled: vectors, by entry.
    """

    runner: ModelRunner
    batch: Batch
    tenures: npt.NDArray[np.int64]
    tokens: HostCopy
    told: LaunchedLogprobs | None
    of_prompts: LaunchedPrompts
    pooled: dict[int, HostCopy]

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
        host: HostBlocks | None = None,
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
            host: where steps move blocks of preempted requests; None = they never do.
            poison: debug: fill every newly handed out block with NaN, so that a read of an unwritten slot is seen.
        """
        self._model = model
        self._backend = backend
        self._pool = pool
        self._host = host or HostBlocks(pool)
        self._poison = poison
        self._on_pass = on_pass
        self._block_size = pool.spec.block_size
        self._context = KVContext(backend)
        blocks_per_row = -(-max_model_len // self._block_size)
        self._tables: npt.NDArray[np.int32] = np.zeros((max_num_seqs, blocks_per_row), np.int32)
        self._tenures: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)  # how often a row was admitted to
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
        self._owed: deque[Callable[[], None]] = deque()  # of steps that came, what is not taken over yet
        self._recordings: Recordings | None = None
        self._ahead: list[int] = []  # sizes to be recorded before they come, from behind
        if isinstance(backend, Recorder):
            self._recordings = Recordings(backend, self._ask_model)
            most = self._recordings.padded(max_num_seqs)
            # The largest first: CUDA graphs share their memory, and what is recorded later fits into it.
            self._ahead = [size for size in backend.recorded_ahead if size <= most]

    @property
    def pool(self) -> KVPool:
        """The KV pool that steps write."""
        return self._pool

    def resume(self) -> None:
        """Compute again after a failed step; called once its successors have come back skipped and its error is forgotten.

        Raises:
            DeviceLostError: the device answers no more in this process.
        """
        on_gpu = self._model.device.type == "cuda"
        probe = partial(torch.cuda.synchronize, self._model.device) if on_gpu else getattr(self._backend, "synchronize", None)
        if probe is not None:
            try:
                probe()
            except Exception as error:
                raise DeviceLostError(f"the device answers no more: {error}") from error
        if on_gpu:
            torch.cuda.empty_cache()  # if memory was short, what torch keeps may be in pieces of the wrong size
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
        try:
            self._take_over(step, params)
            self._see_that_none_failed(step.id)
            return self._compute(step)
        except SkippedStepError:
            raise
        except BaseException:
            self._failed_at = step.id if self._failed_at is None else self._failed_at
            raise

    def _see_that_none_failed(self, step_id: int) -> None:
        """Raise SkippedStepError if an earlier step has."""
        if self._failed_at is not None and self._failed_at < step_id:
            raise SkippedStepError(f"step {step_id} was skipped")

    def _take_over(self, step: Step, params: Mapping[int, RowParams]) -> None:
        """Tables and all moves of blocks: also for a step that is then skipped, because the next one builds on them.

        Each part is done once, in this order. The one that fails, for want of memory, is done again before the next step; that
        may be, because a pool allocates what it needs for copies before it writes the first.
        """
        self._owed.append(partial(self._take_rows, step, params))
        if step.swap_out:
            self._owed.append(partial(self._host.swap_out, step.swap_out))
        if step.clears:
            self._owed.append(partial(self._pool.fill, step.clears, 0.0))
        if step.copies:
            self._owed.append(partial(self._pool.copy, step.copies))
        if step.swap_in:
            self._owed.append(partial(self._host.swap_in, step.swap_in))
        if self._poison:
            self._owed.append(partial(self._poison_new_blocks, step))
        while self._owed:
            self._owed[0]()
            self._owed.popleft()

    def _take_rows(self, step: Step, params: Mapping[int, RowParams]) -> None:
        for row, _ in step.admitted:
            self._sampler.admit(row, params[row])
            self._prompts.admit(row, params[row])
            self._tenures[row] += 1
        for row, first, ids in step.tables:
            self._tables[row, first : first + len(ids)] = ids

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
        batch, ranges, inputs = self._pack(step)
        late = self._late and not self._sampler.needs_history(batch.rows[batch.sampled])
        if not late:
            self._on_pass()
            self._see_that_none_failed(step.id)
        launched = self._finish(batch, ranges, self._forward(*inputs))
        if late:
            self._on_pass()
        return launched

    def _pack(self, step: Step) -> tuple[Batch, list[Range], list[npt.NDArray[np.int64]]]:
        """The step in arrays, ranges whose logits tell of prompt tokens, and what `_forward` gets; the backend is told of it."""
        batch, tensors = pack(step, self._tables, self._block_size)
        ranges = self._prompts.ranges(batch.rows, batch.starts, batch.counts)
        keep = batch.places  # packed rows whose logits are wanted: first those that sample
        if ranges:
            keep = np.concatenate([keep, *(np.arange(part.first, part.first + part.end - part.start) for part in ranges)])
        if self._prompts.pools and self._tap is not None:
            self._tap.expect()
        inputs = [batch.tokens, batch.positions, keep, batch.token_rows]
        if self._recordings is not None and batch.only_decodes and not ranges:
            inputs, tensors = self._padded(inputs, tensors, self._recordings.padded(len(batch.tokens)))
        self._context.metadata = self._backend.prepare(tensors)
        return batch, ranges, inputs

    @staticmethod
    def _padded(
        inputs: list[npt.NDArray[np.int64]], tensors: StepTensors, size: int
    ) -> tuple[list[npt.NDArray[np.int64]], StepTensors]:
        """What `_forward` and the backend get for a step of decodes, as long as a recorded one."""
        count = len(inputs[0])
        if size == count:
            return inputs, tensors
        tokens, positions, keep, token_rows = (np.pad(numbers, (0, size - count)) for numbers in inputs)
        keep[count:] = np.arange(count, size)
        return [tokens, positions, keep, token_rows], padded(tensors, size - count)

    def _forward(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        keep: npt.NDArray[np.int64],
        token_rows: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """[len(keep), vocab_size]; at least one row is computed, because transformers reads an empty list as all."""
        inputs = self._uploaded(tokens, positions, keep if len(keep) else np.zeros(1, np.int64), token_rows)
        if self._recordings is not None and not self._prompts.pools:
            logits = self._recordings.run(inputs, self._context.metadata)
        else:
            logits = self._ask_model(*inputs)
        return logits[: len(keep)]

    def _uploaded(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        keep: npt.NDArray[np.int64],
        token_rows: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and positions, [1, num_tokens], and the rows whose logits are wanted, on the device."""
        ids, places, kept_rows, rows = upload([tokens, positions, keep, token_rows], self._model.device)
        if (tokens == PENDING).any():
            ids = torch.where(ids == PENDING, self._last_token[rows], ids)
        return ids[None], places[None], kept_rows

    @torch.inference_mode()
    def record_ahead(self) -> bool:
        """Record one more size of decode steps before such a step comes; False if there is none left. For idle times."""
        if self._recordings is None:
            return False
        while self._ahead:
            size = self._ahead.pop()
            nothing = StepTensors(
                query_start=torch.zeros(1, dtype=torch.int32),
                seq_lens=torch.zeros(0, dtype=torch.int32),
                block_tables=torch.zeros((0, 1), dtype=torch.int32),
                slots=torch.zeros(0, dtype=torch.int64),
            )
            self._context.metadata = self._backend.prepare(padded(nothing, size))
            zeros = np.zeros(size, np.int64)
            if self._recordings.ahead(self._uploaded(zeros, zeros, np.arange(size), zeros), self._context.metadata):
                return True
        return False

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

    def _finish(self, batch: Batch, ranges: list[Range], logits: torch.Tensor) -> Launched:
        """Sample, and read what else is wanted. State changes last: a step that fails before leaves its rows as they were."""
        rows = batch.rows[batch.sampled]
        own, of_prompts = logits[: len(rows)], logits[len(rows) :]
        told, tokens = None, HostCopy()
        if len(rows):
            chosen, finite = self._choose(rows, batch.positions[batch.places] + 1, own)
            told, tokens = self._sampler.launch_logprobs(rows, own, chosen), HostCopy(chosen, finite)
        scored = self._prompts.launch_logprobs(ranges, of_prompts)
        pooled = {entry: HostCopy(vector) for entry, vector in self._pooled(batch).items()}
        if len(rows):
            self._remember(batch, chosen)
        return Launched(self, batch, self._tenures[batch.rows], tokens, told, scored, pooled)

    def _remember(self, batch: Batch, chosen: torch.Tensor) -> None:
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
        batch, sampled = launched.batch, launched.batch.sampled
        self._see_that_none_failed(batch.step_id)
        try:
            ids, finite = (copy.tolist() for copy in launched.tokens.wait()) if len(sampled) else ([], [])
            bad = {index for index, good in enumerate(finite) if not good}
            extras = self._extras(launched, bad)
        except BaseException:
            self._failed_at = batch.step_id
            raise
        right = kept(batch, ids)
        failed = {int(sampled[index]) for index in bad if right[index]}
        failed |= {entry for entry, copy in launched.pooled.items() if not bool(torch.isfinite(copy.wait()[0]).all())}
        result: list[tuple[int, ...]] = [()] * len(batch.rows)
        for entry, token, keep in zip(sampled.tolist(), ids, right, strict=True):
            if keep:
                result[entry] += (token,)
        self._take(launched, result)
        return Sampled(result, frozenset(failed), extras)

    def _extras(self, launched: Launched, bad: set[int]) -> dict[int, RowExtra]:
        """What entries are told beside their tokens; `bad` indices of `sampled` are told nothing."""
        extras = {entry: RowExtra(prompt_logprobs=told) for entry, told in launched.of_prompts.read().items()}
        for index, told in (launched.told.read(bad) if launched.told is not None else {}).items():
            entry = int(launched.batch.sampled[index])
            extras[entry] = replace(extras.get(entry, RowExtra()), logprobs=told)
        for entry, copy in launched.pooled.items():
            vector = copy.wait()[0].numpy().astype("<f4").tobytes()
            extras[entry] = replace(extras.get(entry, RowExtra()), embedding=vector)
        return extras

    def _take(self, launched: Launched, result: list[tuple[int, ...]]) -> None:
        """What was sampled becomes part of its rows, if they still are whose they were; most have one token, or none."""
        batch, own = launched.batch, launched.tenures == self._tenures[launched.batch.rows]
        nth = 0
        while entries := [entry for entry, tokens in enumerate(result) if len(tokens) > nth and own[entry]]:
            self._sampler.append(batch.rows[entries], [result[entry][nth] for entry in entries])
            nth += 1

    def _choose(
        self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token per row, and whether its logits are finite."""
        return self._sampler.sample(rows, positions, logits)

    def _pooled(self, batch: Batch) -> dict[int, torch.Tensor]:
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

    @torch.inference_mode()
    def warm_up_rows(self, num_tokens: int) -> None:
        """All rows decode, each behind `num_tokens` tokens, and sample in the dearest way. For a runner that serves nobody."""
        size, count = self._block_size, len(self._tables)
        num_tokens = min(num_tokens, self._tables.shape[1] * size, self._pool.spec.num_blocks * size)
        blocks = np.arange(-(-num_tokens // size), dtype=np.int32)
        tables = np.stack([np.roll(blocks, row) for row in range(count)])  # as if nobody shared a block
        last = np.full(count, num_tokens - 1, np.int64)
        self._context.metadata = self._backend.prepare(
            StepTensors(
                query_start=torch.arange(count + 1, dtype=torch.int32),
                seq_lens=torch.full((count,), num_tokens, dtype=torch.int32),
                block_tables=torch.from_numpy(tables),
                slots=torch.from_numpy(tables[:, -1].astype(np.int64) * size + last % size),
            )
        )
        rows, zeros = np.arange(count), np.zeros(count, np.int64)
        logits = self._ask_model(*self._uploaded(zeros, last, rows, zeros))
        for row in range(count):
            self._sampler.admit(row, RowParams(_DEAREST, 0, (0,), 1))
        chosen, _ = self._sampler.sample(rows, last + 1, logits)
        self._sampler.launch_logprobs(rows, logits, chosen).read()

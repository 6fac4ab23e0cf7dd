"""Carries out steps: tables, packed tensors, one forward pass, sampling.

Everything here runs in the runner's one thread. A row is a request's fixed place in the tables below; what a step samples stays
in `last_token`, so that the next step can name it as its input before anybody outside has seen it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from streamkv.attention import AttentionBackend, KVPool, StepTensors
from streamkv.core.step import PENDING, Sampled, Step
from streamkv.runner.hook import KVContext
from streamkv.runner.loader import LoadedModel
from streamkv.runner.params import RowParams
from streamkv.runner.sampler import SamplerRows, sample, token_logprobs

__all__ = ["ModelRunner", "SkippedStepError"]


class SkippedStepError(RuntimeError):
    """The step was not computed because an earlier one failed; its tables and copies were taken over."""


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
        poison: bool = False,
    ) -> None:
        """Set up empty tables.

        Args:
            poison: debug: fill every newly handed out block with NaN, so that a read of an unwritten slot is seen.
        """
        self._model = model
        self._backend = backend
        self._pool = pool
        self._poison = poison
        self._block_size = pool.spec.block_size
        self._context = KVContext(backend)
        blocks_per_row = -(-max_model_len // self._block_size)
        self._tables: npt.NDArray[np.int32] = np.zeros((max_num_seqs, blocks_per_row), np.int32)
        self._last_token: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._temperature: npt.NDArray[np.float32] = np.zeros(max_num_seqs, np.float32)
        self._top_k: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._top_p: npt.NDArray[np.float32] = np.ones(max_num_seqs, np.float32)
        self._seed: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._branch: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._logprobs: npt.NDArray[np.int64] = np.full(max_num_seqs, -1, np.int64)
        self._failed = False

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
            sampling = params[row].sampling
            self._temperature[row] = sampling.temperature
            self._top_k[row] = sampling.top_k
            self._top_p[row] = sampling.top_p
            self._seed[row] = sampling.seed
            self._branch[row] = params[row].branch
            self._logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
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
        sampled = np.flatnonzero(np.asarray(step.samples, bool))  # [num_sampled], entries
        logits = self._forward(tokens, positions, query_start[1:][sampled] - 1)
        return self._sample(step, rows, seq_lens, sampled, logits)

    def _forward(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], keep: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        """[num_sampled, vocab_size]; at least one row is computed, because transformers reads an empty list as all."""
        device = self._model.device
        wanted = torch.from_numpy(keep.astype(np.int64)) if len(keep) else torch.zeros(1, dtype=torch.long)
        output = self._model.module(
            input_ids=torch.from_numpy(tokens)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
            logits_to_keep=wanted.to(device),
            streamkv_context=self._context,
        )
        logits: torch.Tensor = output.logits[0]
        return logits[: len(keep)]

    def _sample(
        self,
        step: Step,
        rows: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int32],
        sampled: npt.NDArray[np.int64],
        logits: torch.Tensor,
    ) -> Sampled:
        result: list[tuple[int, ...]] = [()] * len(rows)
        if not len(sampled):
            return Sampled(result)
        where = rows[sampled]
        device = logits.device
        chosen = sample(
            logits,
            SamplerRows(
                temperature=torch.from_numpy(self._temperature[where]).to(device),
                top_k=torch.from_numpy(self._top_k[where]).to(device),
                top_p=torch.from_numpy(self._top_p[where]).to(device),
                seed=torch.from_numpy(self._seed[where]).to(device),
                branch=torch.from_numpy(self._branch[where]).to(device),
                position=torch.from_numpy(seq_lens[sampled].astype(np.int64)).to(device),
            ),
        )
        # One reduction shows NaN and Inf anywhere in a row: a sum of finite logits stays far from float32's limit.
        bad = ~torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))
        failed = frozenset(int(sampled[index]) for index in bad.nonzero().flatten().tolist())
        wanted = [(index, int(count)) for index, count in enumerate(self._logprobs[where]) if count >= 0 and not bad[index]]
        logprobs = token_logprobs(logits, chosen, wanted)
        ids = chosen.tolist()
        for entry, token in zip(sampled.tolist(), ids, strict=True):
            result[entry] = (token,)
        self._last_token[where] = ids  # last: a step that fails before leaves its rows as they were
        return Sampled(result, failed, {int(sampled[index]): value for index, value in logprobs.items()})

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """One forward pass over `num_tokens` tokens of one sequence in the first blocks, nothing kept: the worst step."""
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
        self._forward(np.zeros(num_tokens, np.int64), positions, np.array([num_tokens - 1], np.int32))

"""One case under way: steps through a backend, judged against contexts that are kept beside the pool."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import torch

from streamkv.attention import AttentionBackend, KVPool, StepTensors
from streamkv_backends.contract.cases import Case
from streamkv_backends.contract.judge import attention, relative_error, require
from streamkv_backends.contract.pool import NAN

__all__ = ["Trial"]

# Entries of a block table past a sequence's end are arbitrary.
ABSURD: Final = (-1, 2**31 - 1)


@dataclass(slots=True)
class Trial:
    """Drives one case. Nothing here depends on the pool's layout.

    Attributes:
        unused: ids of blocks that were never handed out, in random order; they stay NaN.
        canaries: blocks that are never handed out and hold numbers, so that a stray NaN shows too; the last block is where
            slot -1 lands if it is taken for an index.
        tables: block ids of each sequence.
        contexts: [layer][sequence] -> keys and values, [length, num_kv_heads, head_dim].
        plain, worst: largest relative error of plain torch and of the backend so far.
    """

    backend: AttentionBackend
    pool: KVPool
    case: Case
    device: torch.device = field(init=False)
    random: torch.Generator = field(init=False)
    unused: list[int] = field(init=False)
    canaries: list[int] = field(init=False)
    tables: list[list[int]] = field(init=False)
    lengths: list[int] = field(init=False)
    contexts: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(init=False)
    step: int = 0
    plain: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def __post_init__(self) -> None:
        """Start with empty sequences; the same numbers for the same case, whatever ran before."""
        count = len(self.case.workload.steps[0])
        self.device = torch.device(self.backend.limits.device)
        self.random = torch.Generator().manual_seed(zlib.crc32(self.case.name.encode()))
        self.unused = torch.randperm(self.pool.spec.num_blocks, generator=self.random).tolist()
        self.unused.remove(self.pool.spec.num_blocks - 1)
        self.canaries = [self.unused.pop(), self.pool.spec.num_blocks - 1]
        self.tables = [[] for _ in range(count)]
        self.lengths = [0] * count
        self.contexts = []
        for layer in self.case.layers:
            empty = torch.empty((0, layer.num_kv_heads, layer.head_dim), dtype=self.case.dtype, device=self.device)
            self.contexts.append([(empty, empty)] * count)

    def run(self) -> None:
        """All steps, then the verdict on the numbers.

        Raises:
            AssertionError: what is wrong, and where.
        """
        self._check_poison()
        self.pool.fill(list(range(self.pool.spec.num_blocks)), NAN)
        self.pool.fill(self.canaries, 0.5)
        for step, counts in enumerate(self.case.workload.steps):
            self.step = step
            self._move()
            self._fork()
            self._advance([(sequence, count) for sequence, count in enumerate(counts) if count])
        error, where = self.worst
        # Maxima over the whole case: over the few numbers of one sequence a factor of two is within the noise of rounding.
        allowed = 2 * (self.plain or torch.finfo(self.case.dtype).eps / 2)
        require(
            error <= allowed,
            f"{where}: the relative error is {error:.1e}, and {allowed:.1e} is allowed: twice that of plain torch in this dtype",
        )

    def _check_poison(self) -> None:
        """A slot that was filled with NaN must show when a sequence covers it: that is what the debug mode is for."""
        layer, size, block = len(self.case.layers) - 1, self.case.block_size, self.unused[0]
        spec = self.case.layers[layer]
        if size == 1:
            return  # the only slot of a block is the one that a step writes
        tensors = StepTensors(
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([2], dtype=torch.int32),
            block_tables=torch.tensor([[block]], dtype=torch.int32),
            slots=torch.tensor([block * size + 1]),
        )
        sinks = self._normal(spec.num_heads) if spec.has_sinks else None
        output = self.backend.attend(*self._inputs(layer, 1, 1), layer, self.backend.prepare(tensors), sinks)
        require(
            bool(output.isnan().any()),
            "attention over a slot that was filled with NaN shows no NaN: fill does not poison, or attend overwrites other slots",
        )

    def _move(self) -> None:
        for _, sequence in (move for move in self.case.workload.moves if move[0] == self.step):
            old = self.tables[sequence]
            new = [self.unused.pop() for _ in old]
            data = self.pool.read(old)
            self.pool.fill(old, NAN)
            self.pool.write(new, data)
            self.tables[sequence] = new

    def _fork(self) -> None:
        size, copies = self.case.block_size, []
        for _, parent, child in (fork for fork in self.case.workload.forks if fork[0] == self.step):
            full = self.lengths[parent] // size
            self.tables[child] = self.tables[parent][:full]
            if self.lengths[parent] % size:
                self.tables[child].append(self.unused.pop())
                copies.append((self.tables[parent][full], self.tables[child][full]))
            self.lengths[child] = self.lengths[parent]
            for layer in self.contexts:
                layer[child] = layer[parent]
        self.pool.copy(copies)

    def _advance(self, new: list[tuple[int, int]]) -> None:
        """One step: `new` says how many tokens each sequence gets."""
        tensors = self._tensors(new)
        given = _clones(tensors)
        touched = {slot // self.case.block_size for slot in tensors.slots.tolist() if slot >= 0}
        others = [block for block in range(self.pool.spec.num_blocks) if block not in touched]
        before = self.pool.read(others)
        metadata = self.backend.prepare(tensors)
        for layer in range(len(self.case.layers)):
            self._attend(new, layer, len(tensors.slots), metadata)
        unchanged = all(torch.equal(a, b) for a, b in zip(given, _clones(tensors), strict=True))
        require(unchanged, f"step {self.step}: prepare or attend changes the step's tensors")
        changed = (self.pool.read(others) != before).any(dim=1).nonzero().flatten().tolist()
        require(not changed, f"step {self.step} changes blocks {[others[i] for i in changed]}, where no slot of it lies")

    def _tensors(self, new: list[tuple[int, int]]) -> StepTensors:
        size, work = self.case.block_size, self.case.workload
        starts, lengths, slots = [0], [], []
        for sequence, count in new:
            table, first = self.tables[sequence], self.lengths[sequence]
            length = self.lengths[sequence] = first + count
            while len(table) * size < length:
                table.append(self.unused.pop())
            slots += [table[position // size] * size + position % size for position in range(first, length)]
            starts.append(len(slots))
            lengths.append(length)
        starts += [starts[-1] + index + 1 for index in range(work.padding_sequences)]
        lengths += [0] * work.padding_sequences
        slots += [-1] * (work.padding_sequences + work.padding_rows)
        past = (self.unused[0], *ABSURD)  # a poisoned block, or none at all
        width = -(-max(lengths) // size) + 2
        tables = torch.tensor([[past[(row + column) % 3] for column in range(width)] for row in range(len(lengths))])
        for row, (sequence, _) in enumerate(new):
            table = self.tables[sequence]
            tables[row, : len(table)] = torch.tensor(table)
        return StepTensors(
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tables.to(torch.int32),
            slots=torch.tensor(slots, dtype=torch.int64),
        )

    def _attend(self, new: list[tuple[int, int]], layer: int, num_tokens: int, metadata: Any) -> None:
        spec = self.case.layers[layer]
        given = self._inputs(layer, num_tokens, sum(count for _, count in new))
        ranges = self._ranges(new)
        for sequence in self.faulty.intersection(ranges):
            for tensor in given:
                tensor[ranges[sequence]] = NAN
        sinks = self._normal(spec.num_heads) if spec.has_sinks else None
        query, key, value = (tensor.clone() for tensor in given)
        output = self.backend.attend(*given, layer, metadata, sinks)
        where = f"step {self.step}, layer {layer}"
        for name, now, then in zip(("query", "key", "value"), given, (query, key, value), strict=True):
            require(torch.equal(now.nan_to_num(), then.nan_to_num()), f"{where}: attend changes {name}")
        expected = (num_tokens, spec.num_heads, spec.head_dim)
        require(output.shape == expected, f"{where}: the output is {list(output.shape)} instead of {list(expected)}")
        require(output.dtype == query.dtype, f"{where}: the output is {output.dtype}, the query {query.dtype}")
        for sequence, rows in ranges.items():
            if sequence not in self.faulty:
                self._judge(where, sequence, layer, (query[rows], key[rows], value[rows], sinks), output[rows])
        padding = output[sum(count for _, count in new) :]
        require(bool((padding == 0).all()), f"{where}: padding rows of the output are not 0")

    @property
    def faulty(self) -> frozenset[int]:
        """Sequences that compute with NaN in this step."""
        return frozenset(self.case.workload.faulty if self.step else ())

    @staticmethod
    def _ranges(new: list[tuple[int, int]]) -> dict[int, slice]:
        """Rows of each sequence in the packed batch."""
        ends = list(accumulate(count for _, count in new))
        return {sequence: slice(end - count, end) for (sequence, count), end in zip(new, ends, strict=True)}

    def _judge(
        self,
        where: str,
        sequence: int,
        layer: int,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
        output: torch.Tensor,
    ) -> None:
        query, key, value, sinks = inputs
        old_keys, old_values = self.contexts[layer][sequence]
        keys, values = torch.cat([old_keys, key]), torch.cat([old_values, value])
        self.contexts[layer][sequence] = (keys, values)
        where = f"{where}, sequence {sequence} ({len(query)} new of {len(keys)} tokens)"
        require(
            bool(output.isfinite().all()),
            f"{where}: the output has NaN or Inf: it read a slot that holds no token of this context, or did not write one",
        )
        spec = self.case.layers[layer]
        exact = attention(query, keys, values, spec, sinks, torch.float64)
        plain = attention(query, keys, values, spec, sinks, self.case.dtype)
        self.plain = max(self.plain, relative_error(plain, exact))
        self.worst = max(self.worst, (relative_error(output, exact), where))

    def _inputs(self, layer: int, rows: int, real: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in the memory layouts that runners have: by head, sliced from one product, contiguous. Padding rows are NaN."""
        spec = self.case.layers[layer]
        heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        if layer % 3 == 0:
            packed = self._normal(sum(heads), rows, spec.head_dim).transpose(0, 1)
        else:
            packed = self._normal(rows, sum(heads), spec.head_dim)
        packed[:, : spec.num_heads] *= 2  # scores of a few units, so that single tokens matter
        packed[real:] = NAN
        query, key, value = torch.split(packed, heads, dim=1)
        if layer % 3 == 2:
            return query.contiguous(), key.contiguous(), value.contiguous()
        return query, key, value

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).to(self.case.dtype).to(self.device)


def _clones(tensors: StepTensors) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone() for tensor in (tensors.query_start, tensors.seq_lens, tensors.block_tables, tensors.slots))

"""Wrong backends, each with one fault that a real one could have. They are the third party's backend with one method changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamkv.attention import KVSpec, LayerSpec, StepTensors
from tests.backends.third_party.streamkv_pebble import PebbleBackend, PebblePool

PLANTED: dict[str, Planted] = {}


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        backend: the class that has it.
        cases: a part of the names of the cases that must find it, in each dtype.
        says: regular expression that the sentence matches.
    """

    backend: type[PebbleBackend]
    cases: str
    says: str


def planted(cases: str, says: str = "relative error") -> Callable[[type[PebbleBackend]], type[PebbleBackend]]:
    def add(backend: type[PebbleBackend]) -> type[PebbleBackend]:
        PLANTED[backend.__name__] = Planted(backend, cases, says)
        return backend

    return add


# ---------------------------------------------------------------- arithmetic


@planted("window 5")
class IgnoresWindow(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return other <= token


@planted("window 16,")
class WindowOneTooWide(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token, other, replace(spec, window=spec.window + 1) if spec.window else spec)


@planted("window 17,")
class WindowOneTooNarrow(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token, other, replace(spec, window=spec.window - 1) if spec.window else spec)


@planted("sinks, window 9")
class WindowOfFirstLayerForAll(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token, other, replace(spec, window=self.pool.spec.layers[0].window))


@planted("ragged prefill")
class SeesTheNextToken(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token + 1, other, spec)


@planted("decode, plain")
class DoesNotSeeItself(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token, other, spec) & ((other < token) | (token == 0))


@planted("long context")
class ForgetsTheFirstToken(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token, other, spec) & ((other > 0) | (token < 200))


@planted("chunks and decodes mixed, plain")
class ChunkBeginsAtPositionZero(PebbleBackend):
    def visible(self, token: torch.Tensor, other: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().visible(token - token[0] if len(token) > 1 else token, other, spec)


@planted("soft-cap 2")
class ForgetsSoftCap(PebbleBackend):
    def scores(self, scores: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return scores * spec.scale


@planted("soft-cap 2")
class CapsBeforeTheScale(PebbleBackend):
    def scores(self, scores: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().scores(scores, replace(spec, scale=1.0)) * spec.scale


@planted("decode, plain")
class ForgetsTheScale(PebbleBackend):
    def scores(self, scores: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().scores(scores, replace(spec, scale=1.0))


@planted("large scores")
class ScaleIsAlwaysTheUsualOne(PebbleBackend):
    def scores(self, scores: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return super().scores(scores, replace(spec, scale=spec.head_dim**-0.5))


@planted("large scores", "NaN or Inf")
class SoftmaxWithoutMaximum(PebbleBackend):
    def weights(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        raised = scores.exp()
        return raised / raised.sum(dim=-1, keepdim=True)


@planted("sinks")
class ForgetsSinks(PebbleBackend):
    def weights(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        return super().weights(scores, None)


@planted("GQA 6:2")
class MapsHeadsRoundRobin(PebbleBackend):
    def kv_heads(self, spec: LayerSpec) -> torch.Tensor:
        return torch.arange(spec.num_heads) % spec.num_kv_heads


@planted("float32, long context")
class ComputesInSixteenBits(PebbleBackend):
    def attention(self, query: torch.Tensor, keys: torch.Tensor, *others: Any) -> torch.Tensor:
        return super().attention(query.bfloat16(), keys.bfloat16(), *others)


# ---------------------------------------------------------------- reading


@planted("ragged prefill", "NaN or Inf")
class ReadsOneSlotTooFar(PebbleBackend):
    """Only past a sequence's end, where the debug mode has put NaN."""

    def load(self, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.pool.spec.block_size
        longer = length + 1 if length % size else length
        keys, values = super().load(layer, table, longer)
        # The value's weight would be 0 in exact arithmetic, as in a kernel that masks after it has multiplied.
        return keys[:, :length], values[:, :length] + 0 * values[:, longer - 1 : longer]


@planted("long context")
class StopsAfterSixteenBlocks(PebbleBackend):
    def load(self, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = table.clone()
        table[16:] = table[0]
        return super().load(layer, table, length)


@planted("beside a fault", "NaN or Inf")
class MultipliesSequencesTogether(PebbleBackend):
    """As a kernel does that computes a tile of several sequences and masks with zeros."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, *others: Any) -> torch.Tensor:
        output = super().attend(query, key, value, layer, *others)
        return output + 0 * query[others[0].slots >= 0].sum()


@planted("decode, plain", "NaN or Inf|relative error")
class TakesBlocksForConsecutive(PebbleBackend):
    def load(self, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        consecutive = (table[0] + torch.arange(len(table))) % self.pool.spec.num_blocks
        return super().load(layer, consecutive, length)


@planted("unlike layers", "relative error|NaN or Inf")
class AllLayersReadTheFirst(PebbleBackend):
    def load(self, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.pool.spec.layers
        return super().load(0 if spec[0] == spec[layer] or layer == 2 else layer, table, length)


@planted("decode, plain", "NaN or Inf")
class ReadsBeforeItWrites(PebbleBackend):
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, *others: Any) -> torch.Tensor:
        self.held = (layer, others[0].slots, key.clone(), value.clone())
        output = super().attend(query, key, value, layer, *others)
        super().store(*self.held)
        return output

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        pass


@planted("decode, plain", "NaN or Inf|relative error|where no slot|shape|index|changes")
class KeepsTheFirstStepsMetadata(PebbleBackend):
    def allocate_kv(self, spec: KVSpec) -> PebblePool:
        self.kept: dict[tuple[int, int], StepTensors] = {}
        return super().allocate_kv(spec)

    def prepare(self, tensors: StepTensors) -> StepTensors:
        return self.kept.setdefault((len(tensors.seq_lens), len(tensors.slots)), tensors)


# ---------------------------------------------------------------- writing


@planted("decode, plain", "NaN or Inf|relative error")
class WritesToTheNextSlot(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        last = self.pool.spec.num_blocks * self.pool.spec.block_size - 1
        super().store(layer, torch.where(slots >= 0, (slots + 1).clamp(max=last), slots), key, value)


@planted("decode, plain", "NaN or Inf")
class WritesKeysOnly(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().store(layer, slots, key, torch.full_like(value, torch.nan))


@planted("chunks and decodes mixed, plain", "NaN or Inf")
class WritesOnlyTheFirstTokenOfAChunk(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        follows = torch.zeros_like(slots, dtype=torch.bool)
        follows[1:] = slots[1:] == slots[:-1] + 1
        super().store(layer, torch.where(follows, -1, slots), key, value)


@planted("decode, plain", "overwrites other slots")
class ClearsTheBlockItWritesTo(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.pool.layers[layer][(slots[slots >= 0] // self.pool.spec.block_size).unique()] = 0
        super().store(layer, slots, key, value)


@planted("padded", "changes blocks")
class WritesPaddingRows(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().store(layer, slots % (self.pool.spec.num_blocks * self.pool.spec.block_size), key, value)


@planted("shared blocks", "changes blocks")
class WritesABlockNobodyAskedFor(PebbleBackend):
    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().store(layer, slots, key, value)
        used = set((slots // self.pool.spec.block_size).tolist())
        self.pool.fill([next(block for block in range(self.pool.spec.num_blocks) if block not in used)], 0.0)


@planted("decode, plain", "attend changes query")
class ScalesTheQueryInPlace(PebbleBackend):
    def attention(self, query: torch.Tensor, *others: Any) -> torch.Tensor:
        output = super().attention(query, *others)
        query *= 0.125
        return output


# ---------------------------------------------------------------- output


@planted("padded", "padding rows")
class LeavesPaddingRowsAsTheyWere(PebbleBackend):
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, *others: Any) -> torch.Tensor:
        output = super().attend(query, key, value, layer, *others)
        output[others[0].slots < 0] = 1
        return output


@planted("bfloat16, decode, plain", "output is torch.float32")
class AnswersInFloat32(PebbleBackend):
    def attend(self, *arguments: Any) -> torch.Tensor:
        return super().attend(*arguments).float()


@planted("decode, plain", "the output is .* instead of")
class FlattensTheHeads(PebbleBackend):
    def attend(self, *arguments: Any) -> torch.Tensor:
        return super().attend(*arguments).flatten(1)


# ---------------------------------------------------------------- pool


def pool_of(pool: type[PebblePool]) -> type[PebbleBackend]:
    class Backend(PebbleBackend):
        def allocate_kv(self, spec: KVSpec) -> PebblePool:
            self.pool = pool(spec)
            return self.pool

    Backend.__name__ = pool.__name__
    return Backend


def planted_pool(cases: str, says: str) -> Callable[[type[PebblePool]], type[PebblePool]]:
    def add(pool: type[PebblePool]) -> type[PebblePool]:
        planted(cases, says)(pool_of(pool))
        return pool

    return add


@planted_pool("one token", r"after copy\(\[\(0, 1\), \(1, 2\)")
class CopiesOneByOne(PebblePool):
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        for pair in pairs:
            super().copy([pair])


@planted_pool("one token", r"after copy\(\[\(0, 1\)\]\)")
class CopiesKeysOnly(PebblePool):
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            for layer in self.layers:
                layer[target, :, 0] = layer[source, :, 0]


@planted_pool("shared blocks", "after copy|NaN or Inf")
class CopiesTheFirstLayerOnly(PebblePool):
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.layers[0][target] = self.layers[0][source]


@planted_pool("read and written back", "NaN or Inf")
class ReadsAndWritesTheFirstLayerOnly(PebblePool):
    """Consistent with itself: only attention over blocks that were moved can tell."""

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        for layer in self.layers:
            layer[targets] = layer[sources]

    def read(self, block_ids: list[int]) -> torch.Tensor:
        return self.layers[0][block_ids].flatten(1).view(torch.uint8)

    def write(self, block_ids: list[int], data: torch.Tensor) -> None:
        layer = self.layers[0]
        layer[block_ids] = data.contiguous().view(layer.dtype).view(-1, *layer.shape[1:])


@planted_pool("one token", "that order")
class ReadsInSortedOrder(PebblePool):
    def read(self, block_ids: list[int]) -> torch.Tensor:
        return super().read(sorted(block_ids))


@planted_pool("one token", "what read returned changes")
class ReadReturnsAView(PebblePool):
    """Played by bringing what was read up to date at the next fill."""

    def __init__(self, spec: KVSpec) -> None:
        super().__init__(spec)
        self.given: list[tuple[torch.Tensor, list[int]]] = []

    def read(self, block_ids: list[int]) -> torch.Tensor:
        self.given.append((super().read(block_ids), block_ids))
        return self.given[-1][0]

    def fill(self, block_ids: list[int], value: float) -> None:
        super().fill(block_ids, value)
        for tensor, ids in self.given:
            tensor.copy_(super().read(ids))


@planted_pool("one token", "leaves the pool as it was")
class FillDropsNaN(PebblePool):
    def fill(self, block_ids: list[int], value: float) -> None:
        super().fill(block_ids, 0.0 if value != value else value)


@planted_pool("one token", "not given")
class FillsOneBlockMore(PebblePool):
    def fill(self, block_ids: list[int], value: float) -> None:
        super().fill(block_ids, value)
        if block_ids == [4]:
            super().fill([5], value)


@planted_pool("one token", "not zeroed")
class StartsWithRubbish(PebblePool):
    def __init__(self, spec: KVSpec) -> None:
        super().__init__(spec)
        self.layers[-1] += 1


@planted("one token", "it raised IndexError|shows no NaN")
class KeepsTheFirstPool(PebbleBackend):
    pool: PebblePool

    def __init__(self, device: str = "auto") -> None:
        super().__init__(device)
        self.measured: PebblePool | None = None

    def allocate_kv(self, spec: KVSpec) -> PebblePool:
        new = super().allocate_kv(spec)
        self.measured = self.pool = self.measured or new
        return new

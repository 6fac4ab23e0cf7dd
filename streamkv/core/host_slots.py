"""Slots of host memory, each as large as a block: what a preempted request's blocks held waits there for its return.

    preempted   step 7: swap_out (block 3, slot 0), (block 9, slot 1)      the blocks are others' from this very step on
    waits       slots 0 and 1 are the request's
    returns     step 9: swap_in (block 5, slot 0), (block 2, slot 1)       new blocks; the slots are free from the next plan on

A slot is free, held by one waiting request, or read by the step planned last; free + held + read = total, always. Steps are
carried out in the order of their ids, also those that are skipped, so a slot that one step reads may be written by the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from streamkv.core.request import Request
    from streamkv.core.step import Step

__all__ = ["HostSlots", "Saved"]


class Saved(NamedTuple):
    """What the host keeps of a request.

    Attributes:
        first: index in the block table of the first block that is kept; what is before it was others' too.
        slots: of that block and all that follow.
        tokens: so many of the request's tokens end with the last slot.
        step: id of the step that moves them out.
    """

    first: int
    slots: tuple[int, ...]
    tokens: int
    step: int


class HostSlots:
    """Owns every slot and `Request.saved`. Pure: the runner moves what the steps say."""

    def __init__(self, num_slots: int = 0, block_tokens: float = 0.0) -> None:
        """Make all slots.

        Args:
            num_slots: 0 = nothing is ever moved.
            block_tokens: prompt tokens that are computed in the time in which a block is moved out and back in.
        """
        self.num_slots = num_slots
        self.block_tokens = block_tokens
        self.num_out = self.num_in = 0
        self._free = list(range(num_slots - 1, -1, -1))  # popped from the end: low ones first, side by side where they can be
        self._held: dict[str, Request] = {}
        self._read: list[int] = []
        self._out: list[tuple[int, int]] = []  # for the next step
        self._in: list[tuple[int, int]] = []

    @property
    def num_used(self) -> int:
        """Slots that waiting requests hold."""
        return self.num_slots - len(self._free) - len(self._read)

    def cost(self, num_blocks: int, tokens: int) -> float:
        """What bringing back costs, in tokens to compute: `tokens`, or moving so many blocks if that is cheaper and they fit."""
        if num_blocks > len(self._free):
            return tokens
        return min(tokens, num_blocks * self.block_tokens)

    # -- moves ----------------------------------------------------------------------------------------------------

    def save(self, request: Request, first: int, block_ids: list[int], step_id: int) -> None:
        """Have step `step_id` move these blocks out, which hold the request's tokens up to `planned`. Callers checked `cost`."""
        slots = tuple(self._free.pop() for _ in block_ids)
        self._out.extend(zip(block_ids, slots, strict=True))
        request.saved = Saved(first, slots, request.planned, step_id)
        self._held[request.id] = request

    def restore(self, request: Request, slots: tuple[int, ...], block_ids: list[int]) -> None:
        """Have the step that is being planned fill these blocks from some of the request's slots; the others are dropped."""
        saved = self._forget(request)
        self._in.extend(zip(block_ids, slots, strict=True))
        self.num_in += len(slots)
        self._read.extend(saved)

    def drop(self, request: Request) -> None:
        """The request has no use for its slots any more; it need not have any."""
        if request.saved is None:
            return
        slots = self._forget(request)
        self._out = [pair for pair in self._out if pair[1] not in slots]
        self._free.extend(reversed(slots))

    def lose(self, step_id: int) -> None:
        """Step `step_id` and all later ones have failed: what they were to move out is to be computed again."""
        for request in [r for r in self._held.values() if r.saved is not None and r.saved.step >= step_id]:
            self.drop(request)

    def _forget(self, request: Request) -> tuple[int, ...]:
        assert request.saved is not None
        slots = request.saved.slots
        request.saved = None
        del self._held[request.id]
        return slots

    # -- plan -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A plan begins: whatever reads slots has been planned before it."""
        if self._read:
            self._free.extend(reversed(self._read))
            self._read.clear()

    def move(self, step: Step) -> None:
        """Put into a planned step what is to be moved."""
        step.swap_out.extend(self._out)
        step.swap_in.extend(self._in)
        self.num_out += len(self._out)
        self._out.clear()
        self._in.clear()

    # -- looking --------------------------------------------------------------------------------------------------

    def holders(self) -> Collection[Request]:
        """Requests that hold slots, to be read only."""
        return self._held.values()

    def check(self) -> None:
        """Prove that every slot is in one place. Raises AssertionError."""
        held = [slot for request in self._held.values() if request.saved is not None for slot in request.saved.slots]
        assert sorted([*self._free, *self._read, *held]) == list(range(self.num_slots)), "a host slot is lost, or in two places"
        assert self.num_used == len(held), "host slots in use are miscounted"
        assert {slot for _, slot in self._out} <= set(held), "a slot of nobody is to be written"
        assert not self._in, "a step was not told what it moves in"

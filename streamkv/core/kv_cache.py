"""Block tables over the pool: prefix hits, growth, copy-on-write, publication, fences.

A request's blocks, with block size 4 and 10 tokens of which the first 6 came from the cache:

    tokens   a b c d | e f g h | i j
    blocks      7    |    2    |  5
                |         |       +-- new, not full: never published
                |         +---------- private copy of a block that held e f x y: two slots copied, g h computed
                +-------------------- shared with whoever published it

A hit never covers the last token, because its logits are needed; a block that is not matched to its end is copied up to the
first different token. A block is written by one request only: before a write to a shared block it is copied.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Iterable
from hashlib import sha256
from typing import NamedTuple

from streamkv.core.block_pool import BlockPool, Parent
from streamkv.core.host_slots import HostSlots, Saved
from streamkv.core.request import Request
from streamkv.core.step import Miss

__all__ = ["Hit", "KVCache"]


class Hit(NamedTuple):
    """What the cache has of a request's tokens. Valid until the next change of the pool.

    Attributes:
        blocks: whole blocks to share.
        source: block to copy for the part after them; -1 = none.
        partial: number of tokens that the copy saves, or the slots.
        slots: host slots to fill further blocks from, in place of a copy.
    """

    blocks: list[int]
    source: int = -1
    partial: int = 0
    slots: tuple[int, ...] = ()


class KVCache:
    """Owns every block table. Pure: it decides; the runner carries out."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        fingerprint: str = "",
        enable_prefix_caching: bool = True,
        digest_size: int = 32,
        num_host_slots: int = 0,
        swap_block_tokens: float = 0.0,
    ) -> None:
        """Make all blocks.

        Args:
            num_blocks: size of the pool.
            block_size: tokens per block.
            fingerprint: everything that makes KV differ for equal tokens: model, KV dtype, adapter.
            enable_prefix_caching: False = nothing is hashed, published or hit.
            digest_size: bytes kept of each SHA-256; tests use 1 to force collisions.
            num_host_slots: blocks of preempted requests that the host can keep.
            swap_block_tokens: prompt tokens computed in the time in which a block moves to the host and back.
        """
        if block_size < 1:
            raise ValueError("block_size must be at least 1")
        self.pool = BlockPool(num_blocks)
        self.host = HostSlots(num_host_slots, swap_block_tokens)
        self.block_size = block_size
        self._fingerprint = fingerprint
        self._enabled = enable_prefix_caching
        self._digest_size = digest_size
        self._holders: dict[str, Request] = {}
        self._fences: deque[tuple[int, list[int], Request]] = deque()  # (last step that writes them, ids, whose they were)
        self.num_fenced = 0

    # -- hashing --------------------------------------------------------------------------------------------------

    def root(self, salt: str) -> bytes | None:
        """What the first block of a sequence hangs on; None if caching is off. Differs for every salt, model and layout."""
        if not self._enabled:
            return None
        parts = (self._fingerprint, str(self.block_size), salt)
        # Length-prefixed: no choice of salt can imitate another fingerprint.
        return sha256(b"".join(len(p.encode()).to_bytes(4, "little") + p.encode() for p in parts)).digest()

    def extend_keys(self, request: Request) -> None:
        """Hash every full block of the request's tokens that is not hashed yet. O(new tokens)."""
        root = request.root
        if root is None:
            return
        keys, size, tokens = request.keys, self.block_size, request.tokens
        digest = keys[-1][0] if keys else root
        for end in range((len(keys) + 1) * size, len(tokens) + 1, size):
            packed = array("i", tokens[end - size : end]).tobytes()
            digest = sha256(digest + packed).digest()[: self._digest_size]
            keys.append((digest, packed))

    # -- admission ------------------------------------------------------------------------------------------------

    def lookup(self, request: Request) -> Hit:
        """Longest cached prefix of the request's tokens, never all of them, and what the host keeps behind it.

        Changes nothing; keys must be extended.
        """
        hit = self._find(request)
        return hit if request.saved is None else self._with_saved(request, hit, request.saved)

    def _find(self, request: Request) -> Hit:
        root = request.root
        if root is None:
            return Hit([])
        reusable = len(request.tokens) - 1
        full = reusable // self.block_size
        blocks = self.pool.match(request.keys[:full], root)
        start = len(blocks) * self.block_size
        rest = request.tokens[start : min(start + self.block_size, reusable)]
        parent: Parent = self.pool.serial(blocks[-1]) if blocks else root
        source, partial = self.pool.match_partly(parent, array("i", rest).tobytes())
        return Hit(blocks, source, partial)

    def _with_saved(self, request: Request, hit: Hit, saved: Saved) -> Hit:
        """The slots behind the whole blocks of a hit; none if they begin later, or the cache has as much."""
        num_blocks, size = len(hit.blocks), self.block_size
        assert saved.tokens < len(request.tokens), f"the host keeps the last token of {request}"
        rest = saved.tokens - num_blocks * size
        if num_blocks < saved.first or rest <= hit.partial:
            return hit
        return Hit(hit.blocks, partial=rest, slots=saved.slots[num_blocks - saved.first :])

    def blocks_to_admit(self, request: Request, hit: Hit) -> int:
        """How many available blocks it takes to admit `request` with `hit` and hold all its tokens."""
        shared = hit.blocks
        revived = sum(1 for block_id in shared if self.pool.count(block_id) == 0)
        return -(-len(request.tokens) // self.block_size) - len(shared) + revived

    def admit(self, request: Request, hit: Hit) -> list[tuple[int, int]]:
        """Give a request its hit; `computed` and `planned` start behind it.

        Returns:
            Copies (source, destination) that the next step must carry out.
        """
        assert not request.blocks, f"{request} holds blocks already"
        pool = self.pool
        for block_id in hit.blocks:
            pool.acquire(block_id)
        blocks = list(hit.blocks)
        request.blocks = blocks
        request.published = len(blocks)
        request.parent = pool.serial(blocks[-1]) if blocks else request.root
        request.computed = request.planned = len(blocks) * self.block_size + hit.partial
        self._holders[request.id] = request
        if hit.slots:
            filled = [pool.allocate(request.tenant) for _ in hit.slots]
            blocks.extend(filled)
            self.host.restore(request, hit.slots, filled)
            return []
        self.host.drop(request)
        if hit.source < 0:
            return []
        target = pool.allocate(request.tenant)  # may evict the source itself: then the content is in place already
        blocks.append(target)
        return [(hit.source, target)] if target != hit.source else []

    def fork(self, leader: Request, child: Request) -> None:
        """Share the leader's blocks as far as the tokens are equal and computed; the child's last token is left to compute.

        A block that is shared in part is copied by the chunk that follows.
        """
        assert not child.blocks, f"{child} holds blocks already"
        computed = min(child.shared, len(child.tokens) - 1, leader.computed)
        blocks = leader.blocks[: -(-computed // self.block_size)]
        for block_id in blocks:
            self.pool.acquire(block_id)
        child.blocks = blocks
        child.computed = child.planned = computed
        # Whole blocks of the leader were offered to the index already; the chain goes on from the last of them.
        child.published = computed // self.block_size
        child.parent = self._parent_after(child)
        self._holders[child.id] = child

    def _parent_after(self, request: Request) -> Parent | None:
        """Serial of the publication of the request's last published block's content, as the index knows it."""
        if request.root is None:
            return None
        chain = self.pool.match(request.keys[: request.published], request.root)
        if len(chain) < request.published:
            return None
        return self.pool.serial(chain[-1]) if chain else request.root

    def miss(self, request: Request) -> Miss | None:
        """Why a request that was just admitted has to compute from token `request.computed` on; None if only its last is left.

        "differs": a cached block, or the request it is forked from, goes on with another token there.
        "evicted": what follows had been cached and was lost to others.
        "not_cached": nothing that is cached goes on like this; 0 = nothing begins like it.
        "off": the request does not read the cache.

        Only of the request's own salt: what others have cached is not told.
        """
        start = request.computed
        if request.root is None:
            return "off"
        if start >= request.num_prompt - 1:
            return None
        if start % self.block_size:
            return "differs"
        index = start // self.block_size
        lost = index < len(request.keys) and self.pool.was_evicted(request.keys[index][0])
        return "evicted" if lost else "not_cached"

    # -- growth ---------------------------------------------------------------------------------------------------

    def missing(self, request: Request, end: int) -> int:
        """Blocks to allocate before tokens planned..end - 1 of the request can be written (copy-on-write included)."""
        grow = max(0, -(-end // self.block_size) - len(request.blocks))
        return grow + self._shared_tail(request)

    def _shared_tail(self, request: Request) -> bool:
        index = request.planned // self.block_size
        return index < len(request.blocks) and self.pool.count(request.blocks[index]) > 1

    def grow(self, request: Request, end: int) -> tuple[int, tuple[int, ...], list[tuple[int, int]]]:
        """Make the slots of tokens planned..end - 1 exist and be private. Callers have checked `missing`.

        Returns:
            (first changed index of the block table, block ids from there on, copies for the step).
        """
        blocks, pool = request.blocks, self.pool
        first = len(blocks)
        copies: list[tuple[int, int]] = []
        if self._shared_tail(request):
            first = request.planned // self.block_size
            source = blocks[first]
            target = pool.allocate(request.tenant)
            pool.release((source,))
            blocks[first] = target
            copies.append((source, target))
        while len(blocks) * self.block_size < end:
            blocks.append(pool.allocate(request.tenant))
        return first, tuple(blocks[first:]), copies

    # -- commit ---------------------------------------------------------------------------------------------------

    def publish(self, request: Request) -> Iterable[bytes]:
        """Offer every full block of committed tokens to the index.

        Returns:
            Digests of the blocks that are written now, found or not: nobody needs to wait for them any longer.
        """
        full = request.computed // self.block_size
        if request.root is None or full <= request.published:
            return ()
        if len(request.keys) < full:
            self.extend_keys(request)
        done = request.keys[request.published : full]
        for index, (digest, packed) in enumerate(done, request.published):
            if request.parent is None:
                break
            block_id = request.blocks[index]
            request.parent = self.pool.publish(block_id, digest, packed, request.parent, request.salt, request.tenant)
        request.published = full
        return [digest for digest, _ in done]

    def save(self, request: Request, step_id: int) -> None:
        """Before a preempted request loses its blocks: have step `step_id` move to the host what nobody else keeps.

        Not if there is no room, or if computing it again is cheaper. It counts what steps in flight write: the step runs behind
        them, and if one of them fails it is lost with them.
        """
        if not self._may_save(request):
            return
        count = self.pool.count
        end = -(-request.planned // self.block_size)
        first = next((index for index in range(end) if count(request.blocks[index]) == 1), end)
        own = self.own_tokens(request)
        if self.host.cost(end - first, own) < own:
            self.host.save(request, first, request.blocks[first:end], step_id)

    def _may_save(self, request: Request) -> bool:
        return self.host.num_slots > 0 and request.use_cache

    def cost(self, request: Request) -> float:
        """What it takes to bring the request back should it lose its blocks, in tokens to compute."""
        own = self.own_tokens(request)
        return self.host.cost(-(-own // self.block_size), own) if self._may_save(request) else own

    def free(self, request: Request, fence: int | None) -> None:
        """Take all blocks from a request, tail first.

        Args:
            request: its `computed` and `planned` start again from 0.
            fence: id of the last step in flight that may still write them: they stay used until it has ended.
        """
        ids = request.blocks[::-1]
        request.blocks = []
        request.computed = request.planned = 0
        request.published = 0
        request.parent = request.root
        self._holders.pop(request.id, None)
        if fence is None:
            self.pool.release(ids)
        elif ids:
            self._fences.append((fence, ids, request))
            self.num_fenced += len(ids)

    def lift(self, step_id: int) -> None:
        """Step `step_id` has ended: release what was fenced for it or an earlier one."""
        while self._fences and self._fences[0][0] <= step_id:
            _, ids, _ = self._fences.popleft()
            self.num_fenced -= len(ids)
            self.pool.release(ids)

    def spoiled(self, request: Request) -> list[int]:
        """Blocks that only this request may have written and nobody can find, those it has left behind a fence included."""
        pool = self.pool
        fenced = (ids for _, ids, owner in self._fences if owner is request)
        ids = [*request.blocks, *(block_id for left in fenced for block_id in left)]
        return [block_id for block_id in ids if pool.count(block_id) == 1 and pool.serial(block_id) < 0]

    def own_tokens(self, request: Request) -> int:
        """Tokens that would have to be recomputed if the request lost its blocks: those that no other owner keeps."""
        count = self.pool.count
        shared = sum(1 for block_id in request.blocks if count(block_id) > 1)
        return max(0, request.planned - shared * self.block_size)

    # -- looking --------------------------------------------------------------------------------------------------

    def holders(self) -> Collection[Request]:
        """Requests that hold blocks, to be read only."""
        return self._holders.values()

    def fenced_ids(self) -> list[int]:
        """Blocks of requests that have left, which a step in flight may still write."""
        return [block_id for _, ids, _ in self._fences for block_id in ids]

    # -- self-check -----------------------------------------------------------------------------------------------

    def waste(self) -> tuple[int, int]:
        """(slots without a computed token, all slots) in the blocks that requests hold; a shared block counts once."""
        filled: dict[int, int] = {}
        size = self.block_size
        for request in self._holders.values():
            for index, block_id in enumerate(request.blocks):
                used = min(size, max(0, request.planned - index * size))
                filled[block_id] = max(filled.get(block_id, 0), used)
        slots = len(filled) * size
        return slots - sum(filled.values()), slots

    def check(self) -> None:
        """Prove that counts equal owners and that every block a request may write is its own. Raises AssertionError."""
        owners: dict[int, int] = {}
        for request in self._holders.values():
            for block_id in request.blocks:
                owners[block_id] = owners.get(block_id, 0) + 1
        for _, ids, _ in self._fences:
            for block_id in ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        assert self.num_fenced == sum(len(ids) for _, ids, _ in self._fences), "fenced blocks are miscounted"
        self.pool.check(owners)
        self.host.check()
        pool = self.pool
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks, "a block is lost"
        for request in self._holders.values():
            assert request.computed <= request.planned <= len(request.blocks) * self.block_size, f"{request} overruns"
            # Slots between computed and planned are being written by steps in flight.
            for index in range(request.computed // self.block_size, -(-request.planned // self.block_size)):
                if request.computed < request.planned:
                    block_id = request.blocks[index]
                    alone = owners[block_id] == 1 or self._only_fenced_beside(block_id, request)
                    assert alone, f"{request} writes a shared block"

    def _only_fenced_beside(self, block_id: int, request: Request) -> bool:
        """True if every other owner is a fence: a dead request whose last step has yet to end."""
        others = (r for r in self._holders.values() if r is not request)
        return all(block_id not in r.blocks for r in others)

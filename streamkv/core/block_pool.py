"""Who owns which block, and which cached block holds which tokens.

All blocks are made at start. A block is in exactly one of three states, and free + cached + used = total, always:

    free     count 0, no content worth keeping
    cached   count 0, published: its tokens are known, it can be hit, least recently used goes first
    used     count >= 1 (one per block table that lists it, and one per fence)

A *publication* says "this block holds these tokens after that parent". It has a digest (SHA-256 chain, the index key) and a
serial number of its own. A child stores its parent's serial, and a hit needs equal tokens **and** equal parent serial, so
a collision or a recycled parent can never give the wrong KV: the digest only finds a candidate.

Tenants share what is cached. Who needs a block while none is free takes

1. what nobody has wanted for `STALE_S`, the least recently used of all,
2. its own least recently used one, if it has more than its share: cached blocks / tenants that have some,
3. else that of the tenant that has most,
4. else (all have as many) the least recently used of all.

So no tenant loses cached blocks to another while it has less than its share. With one tenant all four are the same block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from streamkv.core.shares import Shares

__all__ = ["STALE_S", "Block", "BlockPool", "Parent"]

STALE_S: Final = 600.0
"""After so long, a share protects a block no longer: a tenant that has gone for the day leaves its part to the others."""

Parent = int | bytes
"""What a publication hangs on: the parent's serial, or the root (bytes) for the first block of a sequence."""


class Block:
    """One block of KV. Written by `BlockPool` only.

    Attributes:
        id: index into the backend's pool.
        count: owners.
        digest: chained hash while published, else None.
        packed: the block's token ids, 4 bytes each, while published.
        parent: serial of the parent publication (or root) while published.
        serial: serial of this publication; -1 while not published.
        salt: whose publication it is, while published.
        tenant: in whose share it is, while published.
        idle_since: `BlockPool.now` when its last owner left it.
    """

    __slots__ = ("count", "digest", "id", "idle_since", "packed", "parent", "salt", "serial", "tenant")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.count = 0
        self.digest: bytes | None = None
        self.packed = b""
        self.parent: Parent = b""
        self.serial = -1
        self.salt = ""
        self.tenant = ""
        self.idle_since = 0.0

    def __repr__(self) -> str:
        return f"Block({self.id} count={self.count} serial={self.serial})"


class BlockPool:
    """Reference counts, the free list, the LRU order of cached blocks and the index. Every operation is O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("num_blocks must be at least 1")
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first
        self._cached: OrderedDict[int, Block] = OrderedDict()  # oldest first
        self._shares = Shares()  # the same by tenant
        self._index: dict[bytes, Block] = {}
        # Children by (parent, first four token bytes): finds a block that matches partly without a scan of all siblings.
        self._children: dict[tuple[Parent, bytes], dict[int, Block]] = {}
        self._live: dict[int, Block] = {}  # serial -> its block
        self._next_serial = 0
        self._evicted: OrderedDict[bytes, None] = OrderedDict()  # digests; as many as blocks, latest last
        self.now = 0.0  # set by the owner of the pool, which has the clock: only for `idle_since`
        self.num_evictions = 0

    # -- counts ---------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks without owner and content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without owner whose content can be hit."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return len(self._blocks) - self.num_available

    def count(self, block_id: int) -> int:
        """Owners of a block."""
        return self._blocks[block_id].count

    # -- ownership ------------------------------------------------------------------------------------------------

    def allocate(self, tenant: str = "") -> int:
        """Hand out one block with one owner; evicts a cached block if none is free.

        Args:
            tenant: who needs it; decides whose block is evicted.

        Raises:
            IndexError: nothing available; callers check `num_available` first.
        """
        if self._free:
            block = self._blocks[self._free.pop()]
        else:
            if not self._cached:
                raise IndexError("no block available")
            block = self._victim(tenant)
            self._uncache(block)
            self._remember(block)
            self._unpublish(block)
            self.num_evictions += 1
        block.count = 1
        return block.id

    def _victim(self, tenant: str) -> Block:
        """The cached block that `tenant` may take."""
        oldest = next(iter(self._cached.values()))
        if self._shares.num_tenants == 1 or self.now - oldest.idle_since > STALE_S:
            return oldest
        block_id = self._shares.victim(tenant, len(self._cached))
        return oldest if block_id is None else self._blocks[block_id]

    def acquire(self, block_id: int) -> None:
        """Add an owner to a used or cached block."""
        block = self._blocks[block_id]
        if block.count == 0:
            self._uncache(block)  # KeyError: a free block has nothing to share
        block.count += 1

    def _uncache(self, block: Block) -> None:
        del self._cached[block.id]
        self._shares.remove(block.tenant, block.id)

    def release(self, block_ids: Iterable[int]) -> None:
        """Take one owner from each block, in the given order: the first released is the first evicted.

        Callers pass a request's blocks tail first, so that a chain loses its leaves before its root.
        """
        blocks = self._blocks
        for block_id in block_ids:
            block = blocks[block_id]
            assert block.count > 0, f"block {block_id} released without an owner"
            block.count -= 1
            if block.count == 0:
                block.idle_since = self.now
                if block.serial >= 0:
                    self._cached[block_id] = block
                    self._shares.add(block.tenant, block_id)
                else:
                    self._free.append(block_id)

    # -- index ----------------------------------------------------------------------------------------------------

    def publish(
        self, block_id: int, digest: bytes, packed: bytes, parent: Parent, salt: str = "", tenant: str = ""
    ) -> Parent | None:
        """Make a full, committed block findable. `salt` only tells whose it is; that others do not find it is the digest's work.

        Args:
            tenant: in whose share it is once it is cached.

        Returns:
            The parent for the block's successor: the serial of this publication, or of an older one with the same tokens
            and parent (this block then stays unpublished: one entry per content). None if the digest is taken by other
            tokens: the chain ends here and the descendants stay unpublished too.
        """
        holder = self._index.get(digest)
        if holder is not None:
            if holder.packed == packed and holder.parent == parent:
                return holder.serial
            if self._reachable(holder):
                return None
            self._retire(holder)  # its parent is gone, nobody can find it by walking: the newcomer takes its place
        block = self._blocks[block_id]
        assert block.serial < 0, f"block {block_id} published twice"
        assert block.count > 0, f"block {block_id} published without an owner"
        block.digest, block.packed, block.parent, block.salt, block.tenant = digest, packed, parent, salt, tenant
        block.serial = self._next_serial
        self._next_serial += 1
        self._index[digest] = block
        self._live[block.serial] = block
        self._children.setdefault((parent, packed[:4]), {})[block_id] = block
        return block.serial

    def match(self, keys: Iterable[tuple[bytes, bytes]], root: bytes) -> list[int]:
        """Longest chain of published blocks that holds these (digest, packed tokens), from `root` on."""
        found: list[int] = []
        append, get = found.append, self._index.get
        parent: Parent = root
        for digest, packed in keys:
            block = get(digest)
            if block is None or block.packed != packed or block.parent != parent:
                break
            append(block.id)
            parent = block.serial
        return found

    def match_partly(self, parent: Parent, packed: bytes, candidates: int = 8) -> tuple[int, int]:
        """The published child of `parent` that shares the longest non-empty prefix with `packed`.

        Looks at no more than `candidates` children, so that a popular parent costs no more than another.

        Returns:
            (block id, number of equal leading tokens); (-1, 0) if none matches.
        """
        best, length = -1, 0
        children = self._children.get((parent, packed[:4]))
        if children is None or not packed:
            return best, length
        for _, (block_id, block) in zip(range(candidates), reversed(children.items()), strict=False):
            equal = _common_prefix(block.packed, packed)
            if equal > length:
                best, length = block_id, equal
        return best, length

    def serial(self, block_id: int) -> int:
        """Serial of a block's publication; -1 if it is not published."""
        return self._blocks[block_id].serial

    def was_evicted(self, digest: bytes) -> bool:
        """True if a block with this digest was lost to others not long ago (among the last `num_blocks` evictions)."""
        return digest in self._evicted

    def _remember(self, block: Block) -> None:
        assert block.digest is not None
        self._evicted[block.digest] = None
        self._evicted.move_to_end(block.digest)
        if len(self._evicted) > len(self._blocks):
            self._evicted.popitem(last=False)

    def withdraw(self, block_id: int) -> None:
        """Forget the publication of a used block, whose content is not to be trusted any more."""
        block = self._blocks[block_id]
        if block.serial >= 0:
            self._unpublish(block)

    def reset(self) -> int:
        """Forget every cached block; returns how many were dropped."""
        dropped = len(self._cached)
        while self._cached:
            _, block = self._cached.popitem(last=False)
            self._unpublish(block)
            self._free.append(block.id)
        self._shares.clear()
        return dropped

    def _reachable(self, block: Block) -> bool:
        parent = block.parent
        return isinstance(parent, bytes) or parent in self._live

    def _retire(self, block: Block) -> None:
        if block.count == 0:
            self._uncache(block)
            self._free.append(block.id)
        self._unpublish(block)

    def _unpublish(self, block: Block) -> None:
        assert block.digest is not None
        del self._index[block.digest]
        del self._live[block.serial]
        key = (block.parent, block.packed[:4])
        siblings = self._children[key]
        del siblings[block.id]
        if not siblings:
            del self._children[key]
        block.digest, block.packed, block.parent, block.serial = None, b"", b"", -1
        block.salt = block.tenant = ""

    # -- looking --------------------------------------------------------------------------------------------------

    def blocks(self) -> Sequence[Block]:
        """All blocks by id, to be read only."""
        return self._blocks

    # -- self-check -----------------------------------------------------------------------------------------------

    def cached_ids(self) -> list[int]:
        """Cached blocks, the least recently used first."""
        return list(self._cached)

    def check(self, owners: dict[int, int]) -> None:
        """Prove the invariants against `owners` (block id -> number of tables and fences that list it).

        Raises:
            AssertionError: with the first violation.
        """
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached, "a block is free and cached"
        for block in self._blocks:
            assert block.count == owners.get(block.id, 0), f"{block} has {owners.get(block.id, 0)} owners"
            assert (block.count == 0) == (block.id in free or block.id in cached), f"{block} is lost"
            published = block.serial >= 0
            assert published == (block.digest is not None), f"{block} is half published"
            if block.id in free:
                assert not published, f"{block} is free and published"
            if block.id in cached:
                assert published, f"{block} is cached and cannot be found"
            if published:
                assert block.digest is not None
                assert self._index[block.digest] is block, f"{block} is not in the index"
                assert self._live[block.serial] is block, f"{block} is not alive"
                assert self._children[block.parent, block.packed[:4]][block.id] is block, f"{block} is no child"
        shares: dict[str, list[int]] = {}
        for block_id, block in self._cached.items():
            shares.setdefault(block.tenant, []).append(block_id)
        self._shares.check(shares)
        published_blocks = sum(1 for block in self._blocks if block.serial >= 0)
        assert len(self._index) == len(self._live) == published_blocks, "index holds what no block has"
        assert sum(map(len, self._children.values())) == published_blocks, "children hold what no block has"


def _common_prefix(left: bytes, right: bytes) -> int:
    """Number of equal leading tokens (4 bytes each), by halving: compares slices in C, not bytes in Python."""
    low, high = 0, min(len(left), len(right)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if left[low * 4 : middle * 4] == right[low * 4 : middle * 4]:
            low = middle
        else:
            high = middle - 1
    return low

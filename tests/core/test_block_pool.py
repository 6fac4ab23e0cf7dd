"""Block pool against an oracle that stores, for every published block, the whole token path it stands for."""

from __future__ import annotations

from array import array
from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamkv.core.block_pool import STALE_S, BlockPool, Parent

ROOT = b"root"
Path = tuple[tuple[int, ...], ...]


def packed(tokens: tuple[int, ...]) -> bytes:
    return array("i", tokens).tobytes()


def keys_of(path: Path, digest_size: int) -> list[tuple[bytes, bytes]]:
    digest, keys = ROOT, []
    for tokens in path:
        digest = sha256(digest + packed(tokens)).digest()[:digest_size]
        keys.append((digest, packed(tokens)))
    return keys


def publish(pool: BlockPool, path: Path, blocks: list[int]) -> list[Parent | None]:
    parent: Parent | None = ROOT
    serials = []
    for (digest, content), block in zip(keys_of(path, 32), blocks, strict=True):
        assert parent is not None
        parent = pool.publish(block, digest, content, parent)
        serials.append(parent)
    return serials


A, B, C = (1, 2), (3, 4), (5, 6)


def test_low_ids_first_and_every_block_once() -> None:
    pool = BlockPool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):
        pool.allocate()
    pool.release([1])
    assert pool.allocate() == 1


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)


def test_a_released_chain_loses_its_tail_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    publish(pool, (A, B, C), blocks)
    pool.release(reversed(blocks))
    assert pool.cached_ids() == blocks[::-1]
    assert pool.allocate() == blocks[2]
    assert pool.match(keys_of((A, B, C), 32), ROOT) == blocks[:2]


def test_a_hit_block_is_the_last_to_be_evicted() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    publish(pool, (A,), [first])
    publish(pool, (B,), [second])
    pool.release([first])
    pool.release([second])
    pool.acquire(first)
    pool.release([first])
    assert pool.allocate() == second


def test_equal_content_is_published_once_and_the_chain_goes_on_behind_the_older_block() -> None:
    pool = BlockPool(3)
    older, newer, child = (pool.allocate() for _ in range(3))
    (serial,) = publish(pool, (A,), [older])
    (again,) = publish(pool, (A,), [newer])
    assert again == serial
    assert pool.serial(newer) == -1
    digest, content = keys_of((A, B), 32)[1]
    assert again is not None
    pool.publish(child, digest, content, again)
    assert pool.match(keys_of((A, B), 32), ROOT) == [older, child]


def test_a_digest_taken_by_other_tokens_ends_the_chain() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    assert pool.publish(first, b"same", packed(A), ROOT) is not None
    assert pool.publish(second, b"same", packed(B), ROOT) is None
    assert pool.match([(b"same", packed(B))], ROOT) == []
    assert pool.match([(b"same", packed(A))], ROOT) == [first]


def test_a_child_is_not_found_behind_a_recycled_parent() -> None:
    """Equal tokens and digest do not suffice: the parent must be the very publication that the child was computed behind."""
    pool = BlockPool(2)
    parent, child = pool.allocate(), pool.allocate()
    publish(pool, (A, B), [parent, child])
    pool.release([parent])
    assert pool.allocate() == parent  # evicted
    publish(pool, (A,), [parent])  # same content, new publication
    assert pool.match(keys_of((A, B), 32), ROOT) == [parent]


def test_an_entry_that_nobody_can_reach_gives_way() -> None:
    pool = BlockPool(3)
    parent, child, newer = (pool.allocate() for _ in range(3))
    publish(pool, (A, B), [parent, child])
    pool.release([child])
    pool.withdraw(parent)
    serials = publish(pool, (A, B), [parent, newer])
    assert serials[1] is not None
    assert pool.match(keys_of((A, B), 32), ROOT) == [parent, newer]
    pool.check({parent: 1, newer: 1})


def test_partial_match_finds_the_longest_common_start_among_children() -> None:
    pool = BlockPool(3)
    ids = [pool.allocate() for _ in range(3)]
    for block, tokens in zip(ids, [(1, 2, 3, 4), (1, 2, 9, 9), (7, 2, 3, 4)], strict=True):
        publish(pool, (tokens,), [block])
    assert pool.match_partly(ROOT, packed((1, 2, 3, 8))) == (ids[0], 3)
    assert pool.match_partly(ROOT, packed((1, 2, 9))) == (ids[1], 3)
    assert pool.match_partly(ROOT, packed((8, 2))) == (-1, 0)
    assert pool.match_partly(ROOT, b"") == (-1, 0)
    assert pool.match_partly(b"elsewhere", packed((1, 2))) == (-1, 0)


def test_reset_forgets_what_is_cached_and_keeps_what_is_used() -> None:
    pool = BlockPool(2)
    used, cached = pool.allocate(), pool.allocate()
    publish(pool, (A,), [used])
    publish(pool, (B,), [cached])
    pool.release([cached])
    assert pool.reset() == 1
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 0, 1)
    assert pool.match(keys_of((A,), 32), ROOT) == [used]


def cached(owners: str, *, num_blocks: int | None = None) -> BlockPool:
    """A pool whose blocks 0, 1, 2, … are cached, of the tenants that `owners` names, the first the least recently used."""
    pool = BlockPool(num_blocks or len(owners))
    for number, tenant in enumerate(owners):
        block = pool.allocate(tenant)
        (digest, content), *_ = keys_of(((number, number),), 32)
        pool.publish(block, digest, content, ROOT, tenant=tenant)
        pool.release([block])
        pool.now += 1.0
    return pool


def taken(pool: BlockPool, tenant: str, times: int) -> list[int]:
    blocks = [pool.allocate(tenant) for _ in range(times)]
    pool.check(dict.fromkeys(blocks, 1))
    return blocks


def test_who_has_more_than_its_share_takes_from_itself() -> None:
    assert taken(cached("BBAAAAAB"), "A", 2) == [2, 3]


def test_who_has_less_takes_from_whoever_has_most() -> None:
    assert taken(cached("BCBAAAAC"), "B", 1) == [3]
    assert taken(cached("BCBAAAAC"), "nobody", 2) == [3, 4]


def test_among_equals_the_least_recently_used_goes_first() -> None:
    assert taken(cached("ABBACC"), "C", 1) == [0]
    assert taken(cached("ABBACC"), "D", 1) == [0]


def test_a_flood_leaves_others_what_they_have_up_to_their_share() -> None:
    pool = cached("BBB" + "A" * 9)
    for _ in range(40):
        (block,) = taken(pool, "A", 1)
        (digest, content), *_ = keys_of(((99, pool.num_evictions),), 32)
        pool.publish(block, digest, content, ROOT, tenant="A")
        pool.release([block])
    assert [pool.match(keys_of(((n, n),), 32), ROOT) for n in range(3)] == [[0], [1], [2]]


def test_nothing_is_kept_for_who_has_not_wanted_it_for_long() -> None:
    pool = cached("BBAAAA")
    pool.now = STALE_S + 0.5  # the first of B's is older than that, the second is not
    assert taken(pool, "A", 2) == [0, 2]


def test_after_a_reset_nobody_has_a_share() -> None:
    pool = cached("BBAAAA")
    (block,) = taken(pool, "C", 1)
    pool.reset()
    pool.check({block: 1})
    assert pool.num_free == 5


def test_check_sees_a_wrong_count() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.check({block: 1})
    for owners in ({}, {block: 2}, {block: 1, 1: 1}):
        with pytest.raises(AssertionError):
            pool.check(owners)


class PoolMachine(RuleBasedStateMachine):
    """Random owners allocate, share, publish and release; the oracle keeps lists and whole paths, and searches them."""

    @initialize(num_blocks=st.integers(1, 8), digest_size=st.sampled_from([1, 32]))
    def start(self, num_blocks: int, digest_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks, self.digest_size = num_blocks, digest_size
        self.owners: dict[int, int] = {}
        self.path: dict[int, Path] = {}  # of every published block
        self.lru: list[int] = []
        self.tenant: dict[int, str] = {}  # of every published block
        self.idle: dict[int, float] = {}
        self.serials: dict[int, Path] = {}

    def _unpublish(self, block: int) -> None:
        self.path.pop(block, None)

    @rule(tenant=st.sampled_from("AABC"))
    def allocate(self, tenant: str) -> None:
        free = set(range(self.num_blocks)) - set(self.owners) - set(self.lru)
        if not free and not self.lru:
            with pytest.raises(IndexError):
                self.pool.allocate(tenant)
            return
        block = self.pool.allocate(tenant)
        if free:
            assert block in free, "a cached block was taken while another was free"
        else:
            self._check_victim(block, tenant)
            self.lru.remove(block)
            self._unpublish(block)
        self.owners[block] = 1

    def _check_victim(self, victim: int, tenant: str) -> None:
        held = Counter(self.tenant[block] for block in self.lru)
        own = [block for block in self.lru if self.tenant[block] == self.tenant[victim]]
        most = max(held.values())
        if len(held) == 1 or self.pool.now - self.idle[self.lru[0]] > STALE_S or most == min(held.values()):
            assert victim == self.lru[0], "not the least recently used"
        elif held[tenant] * len(held) > len(self.lru):
            assert (self.tenant[victim], victim) == (tenant, own[0]), "not its own, though it has more than its share"
        else:
            assert (len(own), victim) == (most, own[0]), "not of the tenant that has most"

    @rule(seconds=st.sampled_from([1.0, STALE_S / 2, STALE_S]))
    def wait(self, seconds: float) -> None:
        self.pool.now += seconds

    @precondition(lambda self: self.owners or self.lru)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted([*self.owners, *self.lru])))
        self.pool.acquire(block)
        if block in self.lru:
            self.lru.remove(block)
        self.owners[block] = self.owners.get(block, 0) + 1

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.owners)), min_size=1, max_size=4, unique=True))
        self.pool.release(blocks)
        for block in blocks:
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
                if block in self.path:
                    self.lru.append(block)
                    self.idle[block] = self.pool.now

    @precondition(lambda self: any(block not in self.path for block in self.owners))
    @rule(data=st.data(), tokens=st.tuples(st.integers(0, 2), st.integers(0, 2)), tenant=st.sampled_from("AABC"))
    def publish(self, data: st.DataObject, tokens: tuple[int, int], tenant: str) -> None:
        """A block with `tokens` behind any published block (or the root)."""
        block = data.draw(st.sampled_from(sorted(b for b in self.owners if b not in self.path)))
        behind = data.draw(st.sampled_from([None, *sorted(self.path)]))
        before: Path = () if behind is None else self.path[behind]
        parent: Parent = ROOT if behind is None else self.pool.serial(behind)
        path = (*before, tokens)
        if len(path) > 4:
            return
        digest, content = keys_of(path, self.digest_size)[-1]
        serial = self.pool.publish(block, digest, content, parent, tenant=tenant)
        # An unreachable holder of the digest may have been retired: it is then neither cached nor found any more.
        for other in [b for b in self.path if self.pool.serial(b) < 0]:
            self._unpublish(other)
            if other in self.lru:
                self.lru.remove(other)
        if serial is None:
            return
        assert isinstance(serial, int)
        if self.pool.serial(block) == serial:
            self.path[block], self.tenant[block] = path, tenant
            self.serials[serial] = path
        assert self.serials[serial] == path, "the chain would go on behind other tokens"

    @precondition(lambda self: any(b in self.path for b in self.owners))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(b for b in self.owners if b in self.path)))
        self.pool.withdraw(block)
        self._unpublish(block)

    @rule()
    def reset(self) -> None:
        assert self.pool.reset() == len(self.lru)
        for block in self.lru:
            self._unpublish(block)
        self.lru = []

    @rule(path=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=4).map(tuple))
    def look_up(self, path: Path) -> None:
        found = self.pool.match(keys_of(path, self.digest_size), ROOT)
        for depth, block in enumerate(found, 1):
            assert self.path[block] == path[:depth], "a hit holds other tokens"
        parent: Parent = self.pool.serial(found[-1]) if found else ROOT
        rest = path[len(found)] if len(found) < len(path) else ()
        source, equal = self.pool.match_partly(parent, packed(rest))
        if source >= 0:
            assert 0 < equal <= len(rest)
            assert self.path[source][:-1] == path[: len(found)], "a partial hit hangs on another prefix"
            assert self.path[source][-1][:equal] == rest[:equal]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(self.owners)
        assert self.pool.cached_ids() == self.lru, "LRU order"
        assert self.pool.num_used == len(self.owners)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == self.num_blocks
        for block in range(self.num_blocks):
            assert self.pool.count(block) == self.owners.get(block, 0)
            assert (self.pool.serial(block) >= 0) == (block in self.path)


PoolMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestBlockPoolAgainstOracle = PoolMachine.TestCase

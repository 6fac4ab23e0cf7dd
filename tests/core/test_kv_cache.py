"""Block tables: hits, copies, growth, fences, waste."""

from __future__ import annotations

from hashlib import sha256

import pytest

from streamkv.core.kv_cache import Hit, KVCache
from streamkv.core.request import Request, StopRule

SIZE = 4


def ask(
    cache: KVCache, tokens: list[int], *, name: str = "r", salt: str = "", use_cache: bool = True, tenant: str = ""
) -> Request:
    root = cache.root(salt) if use_cache else None
    # `shared` in case it is forked from another.
    request = Request(name, tokens, StopRule(8), arrival=0, root=root, tenant=tenant, shared=len(tokens))
    cache.extend_keys(request)
    return request


def write(cache: KVCache, request: Request, end: int | None = None) -> list[tuple[int, int]]:
    """As a step would: grow, compute, commit, publish."""
    end = len(request.tokens) if end is None else end
    _, _, copies = cache.grow(request, end)
    request.computed = request.planned = end
    cache.publish(request)
    cache.check()
    return copies


def written(cache: KVCache, tokens: list[int], *, name: str = "first", salt: str = "", tenant: str = "") -> Request:
    request = ask(cache, tokens, name=name, salt=salt, tenant=tenant)
    cache.admit(request, cache.lookup(request))
    write(cache, request)
    return request


def test_a_hit_never_covers_the_last_token() -> None:
    cache = KVCache(8, SIZE)
    first = written(cache, list(range(8)))
    hit = cache.lookup(ask(cache, list(range(8))))
    assert hit == Hit(first.blocks[:1], first.blocks[1], 3)
    hit = cache.lookup(ask(cache, list(range(9))))
    assert hit == Hit(first.blocks[:2], -1, 0)


def test_a_partly_matching_block_is_copied_up_to_the_first_different_token() -> None:
    cache = KVCache(8, SIZE)
    first = written(cache, list(range(8)))
    second = ask(cache, [0, 1, 2, 3, 4, 5, 99, 99, 99], name="second")
    copies = cache.admit(second, cache.lookup(second))
    assert copies == [(first.blocks[1], second.blocks[1])]
    assert second.blocks[0] == first.blocks[0]
    assert (second.computed, second.planned) == (6, 6)


def test_a_copy_whose_source_is_evicted_for_it_needs_no_copy() -> None:
    cache = KVCache(2, SIZE)
    first = written(cache, list(range(8)))
    source = first.blocks[1]
    cache.free(first, None)
    second = ask(cache, [0, 1, 2, 3, 4, 5, 99], name="second")
    assert cache.admit(second, cache.lookup(second)) == []
    assert second.blocks[1] == source
    cache.check()


def test_blocks_are_taken_in_the_name_of_the_tenant() -> None:
    """Both have more than a third of what is cached; each takes from itself, though the other has more or older blocks."""
    cache = KVCache(13, SIZE)
    for tenant, start, blocks in (("a", 0, 5), ("b", 100, 6), ("c", 200, 1)):
        cache.free(written(cache, list(range(start, start + blocks * SIZE)), tenant=tenant), None)
    held = ask(cache, [300], name="held", tenant="c")
    cache.admit(held, cache.lookup(held))
    write(cache, held)  # the last free block
    for tenant, start, own in (("b", 400, range(5, 11)), ("a", 500, range(5))):
        grown = ask(cache, list(range(start, start + SIZE + 1)), name=f"{tenant} grown", tenant=tenant)
        cache.admit(grown, cache.lookup(grown))
        write(cache, grown)
        assert set(grown.blocks) <= set(own)
    copied = ask(cache, [*range(100, 102), 99, 99], name="copied", tenant="a")
    cache.admit(copied, cache.lookup(copied))
    assert set(copied.blocks) <= set(range(5)), "the block for the copy"


def test_other_salt_model_layout_or_a_request_that_must_not_read_has_no_hit() -> None:
    cache = KVCache(8, SIZE)
    written(cache, list(range(8)), salt="mine")
    tokens = list(range(9))
    assert cache.lookup(ask(cache, tokens, salt="mine")).blocks
    for other in (ask(cache, tokens), ask(cache, tokens, salt="min"), ask(cache, tokens, salt="mine", use_cache=False)):
        assert cache.lookup(other) == Hit([])
    roots = {KVCache(1, size, fingerprint=print_).root(salt) for size in (8, 16) for print_ in ("a", "ab") for salt in ("", "b")}
    assert len(roots) == 8
    assert KVCache(1, SIZE, enable_prefix_caching=False).root("") is None


def test_hashing_is_incremental_and_equals_hashing_at_once() -> None:
    cache = KVCache(8, SIZE)
    grown = ask(cache, list(range(5)))
    assert len(grown.keys) == 1
    for token in range(5, 13):
        grown.tokens.append(token)
        cache.extend_keys(grown)
    assert grown.keys == ask(cache, list(range(13))).keys
    assert len(grown.keys) == 3


def test_a_digest_covers_the_whole_prefix() -> None:
    cache = KVCache(8, SIZE)
    keys = ask(cache, [7] * 12).keys
    assert len({digest for digest, _ in keys}) == 3, "equal blocks at different places"
    assert len({packed for _, packed in keys}) == 1
    assert keys[1][0] == sha256(keys[0][0] + keys[1][1]).digest()


def test_a_freed_request_loses_its_tail_first() -> None:
    cache = KVCache(3, SIZE)
    first = written(cache, list(range(12)))
    blocks = first.blocks
    cache.free(first, None)
    assert cache.pool.cached_ids() == blocks[::-1]


def test_only_full_committed_blocks_are_published() -> None:
    cache = KVCache(8, SIZE)
    first = ask(cache, list(range(12)))
    cache.admit(first, cache.lookup(first))
    cache.grow(first, 12)
    first.planned = 12  # a step in flight writes them
    cache.publish(first)
    assert cache.lookup(ask(cache, list(range(12)))) == Hit([])
    first.computed = 7
    assert len(list(cache.publish(first))) == 1
    assert cache.lookup(ask(cache, list(range(12)))).blocks == first.blocks[:1]


def test_a_fork_shares_the_prompt_and_writes_into_a_copy() -> None:
    cache = KVCache(8, SIZE)
    leader = written(cache, list(range(6)))
    child = ask(cache, list(range(6)), name="child")
    cache.fork(leader, child)
    assert child.blocks == leader.blocks
    assert child.computed == 5
    copies = write(cache, child)
    assert copies == [(leader.blocks[1], child.blocks[1])]
    assert child.blocks[0] == leader.blocks[0]
    assert child.blocks[1] != leader.blocks[1]


def test_a_fork_at_a_block_boundary_copies_the_block_of_the_last_token() -> None:
    cache = KVCache(8, SIZE)
    leader = written(cache, list(range(8)))
    child = ask(cache, list(range(8)), name="child")
    cache.fork(leader, child)
    assert write(cache, child) == [(leader.blocks[1], child.blocks[1])]
    child = ask(cache, list(range(5)), name="short")
    short = written(cache, [9, 8, 7, 6, 5], name="short leader")
    child.tokens = list(short.tokens)
    cache.fork(short, child)
    assert child.blocks == short.blocks[:1], "the block of the last token starts new: nothing to copy"
    assert write(cache, child) == []


def test_missing_counts_growth_and_copy() -> None:
    cache = KVCache(8, SIZE)
    leader = written(cache, list(range(6)))
    child = ask(cache, list(range(6)), name="child")
    assert cache.missing(child, 6) == 2
    cache.fork(leader, child)
    assert cache.missing(child, 6) == 1
    assert cache.missing(child, 9) == 2
    write(cache, child, 9)
    assert cache.missing(child, 12) == 0


def test_blocks_freed_behind_a_step_in_flight_stay_used_until_it_has_ended() -> None:
    cache = KVCache(4, SIZE)
    first = written(cache, list(range(8)))
    cache.free(first, fence=3)
    assert (cache.pool.num_used, cache.num_fenced) == (2, 2)
    cache.lift(2)
    assert cache.num_fenced == 2
    cache.check()
    cache.lift(3)
    assert (cache.pool.num_used, cache.num_fenced, cache.pool.num_cached) == (0, 0, 2)
    assert (first.computed, first.planned, first.blocks) == (0, 0, [])


def test_spoiled_blocks_are_those_that_nobody_else_has_even_behind_a_fence() -> None:
    cache = KVCache(8, SIZE)
    first = written(cache, list(range(6)))
    assert cache.spoiled(first) == first.blocks[1:], "the full block is published: it was right when it was committed"
    tail = first.blocks[1]
    cache.free(first, fence=1)
    assert cache.spoiled(first) == [tail]


def test_waste_counts_a_shared_block_once() -> None:
    cache = KVCache(8, SIZE)
    leader = written(cache, list(range(6)))
    assert cache.waste() == (2, 8)
    child = ask(cache, list(range(6)), name="child")
    cache.fork(leader, child)
    assert cache.waste() == (2, 8)
    write(cache, child)
    assert cache.waste() == (4, 12)


def test_blocks_to_admit_counts_cached_blocks_that_come_back_into_use() -> None:
    cache = KVCache(4, SIZE)
    first = written(cache, list(range(8)))
    again = ask(cache, list(range(9)), name="again")
    assert cache.blocks_to_admit(again, cache.lookup(again)) == 1
    cache.free(first, None)
    assert cache.blocks_to_admit(again, cache.lookup(again)) == 3


def test_check_sees_a_write_to_a_shared_block() -> None:
    cache = KVCache(8, SIZE)
    leader = written(cache, list(range(6)))
    child = ask(cache, list(range(6)), name="child")
    cache.fork(leader, child)
    child.planned = 6  # without the copy
    with pytest.raises(AssertionError, match="shared"):
        cache.check()


def test_a_block_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size"):
        KVCache(1, 0)


def test_a_fork_shares_as_far_as_the_tokens_are_equal_and_computed() -> None:
    for shared, computed_by_leader, expected in ((9, 9, 9), (9, 7, 7), (5, 9, 5), (8, 9, 8), (12, 9, 9)):
        cache = KVCache(12, SIZE)
        leader = written(cache, list(range(9)))
        leader.computed = computed_by_leader
        child = ask(cache, [*range(shared), 99, 98], name="child")
        child.shared = shared
        cache.fork(leader, child)
        assert child.computed == expected
        assert child.blocks == leader.blocks[: -(-expected // SIZE)]
        leader.computed = 9
        copies = write(cache, child)
        assert len(copies) == (expected % SIZE > 0), "a block that is shared in part is copied"
        cache.free(child, None)
        cache.free(leader, None)
        cache.check()

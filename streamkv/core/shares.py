"""Cached blocks, tenant by tenant: who has how many, and which of them was used least recently. Every operation is O(1)."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

__all__ = ["Shares"]


class Shares:
    """Cached blocks of every tenant that has some."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}  # least recently used first
        # Kept while there are two tenants or more: one alone has nobody to be compared with, and should not pay for it.
        self._by_size: defaultdict[int, dict[str, None]] = defaultdict(dict)  # number of blocks -> tenants that have so many
        self._most = 0

    @property
    def num_tenants(self) -> int:
        """Those that have some."""
        return len(self._blocks)

    def add(self, tenant: str, block_id: int) -> None:
        """A block is cached, as the tenant's latest."""
        blocks = self._blocks.get(tenant)
        if blocks is None:
            if len(self._blocks) == 1:
                self._compare()
            blocks = self._blocks[tenant] = OrderedDict()
        blocks[block_id] = None
        if len(self._blocks) > 1:
            self._resize(tenant, len(blocks) - 1, len(blocks))

    def remove(self, tenant: str, block_id: int) -> None:
        """It is not cached any more.

        Raises:
            KeyError: it is none of the tenant's.
        """
        blocks = self._blocks[tenant]
        del blocks[block_id]
        if len(self._blocks) > 1:
            self._resize(tenant, len(blocks) + 1, len(blocks))
        if not blocks:
            del self._blocks[tenant]

    def _compare(self) -> None:
        """The only tenant will not be the only one any more."""
        ((tenant, blocks),) = self._blocks.items()
        self._by_size.clear()
        self._most = len(blocks)
        self._by_size[self._most][tenant] = None

    def _resize(self, tenant: str, before: int, after: int) -> None:
        """By one, up or down."""
        if before:
            del self._by_size[before][tenant]
        if after:
            self._by_size[after][tenant] = None
        if after > self._most or not self._by_size[self._most]:
            self._most = after

    def victim(self, tenant: str, num_cached: int) -> int | None:
        """The block that `tenant` may take from those that have more than their share. There are two tenants or more.

        Args:
            num_cached: blocks of all tenants together.

        Returns:
            The least recently used one of its own, if it has more than its share; else of the tenant that has most; None if all
            have as many.
        """
        share = num_cached / len(self._blocks)
        blocks = self._blocks.get(tenant)
        if blocks is None or len(blocks) <= share:
            if self._most <= share:
                return None
            blocks = self._blocks[next(iter(self._by_size[self._most]))]
        return next(iter(blocks))

    def clear(self) -> None:
        """Nothing is cached."""
        self._blocks.clear()

    def check(self, expected: dict[str, list[int]]) -> None:
        """Prove that these are the blocks of each tenant, in order. Raises AssertionError."""
        assert {tenant: list(blocks) for tenant, blocks in self._blocks.items()} == expected, "a share is not what is cached"
        if len(expected) > 1:
            counted = [(tenant, size) for size, tenants in self._by_size.items() for tenant in tenants]
            assert sorted(counted) == sorted((tenant, len(blocks)) for tenant, blocks in expected.items()), "miscounted"
            assert self._most == max(size for _, size in counted), "the most is not the most"

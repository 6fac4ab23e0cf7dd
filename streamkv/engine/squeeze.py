"""How many tokens a step may have while memory is short."""

from __future__ import annotations

from typing import Final

__all__ = ["Squeeze"]

_STEPS: Final = 16
"""Steps that must succeed before the next ones may be twice as large."""
_LAST_TRIES: Final = 3
"""Failures in a row, of whatever size, after which a request that is alone with a block of tokens is not tried again."""


class Squeeze:
    """Decides after each step that ran out of memory, and grows back afterwards. Pure.

    The first failure is retried as it is: what torch keeps for later has been given back by then, and who else took the memory
    may be gone. From the second in a row on steps are halved, down to one request with a block of tokens. If not even that
    fits, that request has to go.
    """

    def __init__(self, max_tokens: int, block_size: int) -> None:
        self.tokens = max_tokens
        """Most tokens of a step now."""
        self._most = max_tokens
        self._block_size = block_size
        self._failures = 0  # in a row
        self._successes = 0  # since `tokens` was changed

    def failed(self, num_rows: int, num_tokens: int) -> bool:
        """A step of so many requests and tokens ran out of memory; `tokens` may be less now.

        Returns:
            False if it cannot be made smaller: the request in it must end.
        """
        self._failures += 1
        self._successes = 0
        if self._failures == 1:
            return True
        if num_rows == 1 and num_tokens <= self._block_size:
            if self._failures < _LAST_TRIES:
                return True
            self._failures = 0  # the next one has its own tries
            return False
        self.tokens = max(1, num_tokens // 2)
        return True

    def succeeded(self) -> bool:
        """A step went well.

        Returns:
            True if `tokens` has grown.
        """
        self._failures = 0
        if self.tokens == self._most:
            return False
        self._successes += 1
        if self._successes < _STEPS:
            return False
        self._successes = 0
        self.tokens = min(self._most, 2 * self.tokens)
        return True

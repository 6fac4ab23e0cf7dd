"""Drafts for speculative decoding, looked up in the request's own tokens (prompt look-up decoding, Saxena 2023).

Answers often repeat pieces of their prompt: quotations, code that is edited, names. Where the last tokens have stood before, what
followed them there is proposed; the model checks all of it in one pass, as cheap as one token while the pass is bound by memory.
"""

from __future__ import annotations

from typing import Final

__all__ = ["PromptLookup"]

_GRAMS: Final = (4, 2)
"""How many last tokens must have stood before; the longest that matches counts."""
_LONGEST: Final = 16
_FIRST: Final = 4
_PATIENCE: Final = 3
_PAUSE: Final = 8
_LONGEST_PAUSE: Final = 256
_AT_ONCE: Final = 2048


class PromptLookup:
    """One request's index, and how well its proposals have done.

    Proposals grow while all of them are right, shrink to what was, and pause when several in a row were wrong, each time for
    twice as many tokens: where nothing is repeated they cost nothing.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # gram, as one number -> position behind its latest occurrence
        self._indexed = 0  # grams that end before this position are in it
        self._length = _FIRST
        self._misses = 0
        self._pause = _PAUSE
        self._resume_at = 0

    def propose(self, tokens: list[int], pending: int, most: int) -> list[int]:
        """What may come after `tokens` and `pending` further ones that are not known yet.

        Args:
            tokens: all that are known; only ever grows.
            pending: how many are being computed; a proposal begins behind them.
            most: longest proposal that is of use.

        Returns:
            Token ids, none if nothing is worth a try.
        """
        most = min(most, self._length)
        if most < 1 or len(tokens) < self._resume_at:
            return []
        self._index(tokens)
        for size in _GRAMS:
            found = self._seen.get(_number(tokens[-size:])) if len(tokens) > size else None
            if found is not None:
                # A piece that repeats itself goes on as it did: what is proposed may be proposed again.
                follows: list[int] = []
                for position in range(found, found + pending + most):
                    follows.append(tokens[position] if position < len(tokens) else follows[position - len(tokens)])
                return follows[pending:]
        return []

    def learn(self, tokens: int, proposed: int, accepted: int) -> None:
        """How many of a proposal were right.

        Args:
            tokens: how many are known now.
        """
        if accepted == proposed:
            self._length = min(2 * self._length, _LONGEST)
        else:
            self._length = max(1, accepted)
        if accepted:
            self._misses, self._pause = 0, _PAUSE
            return
        self._misses += 1
        if self._misses >= _PATIENCE:
            self._misses = 0
            self._resume_at = tokens + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._length = _FIRST

    def _index(self, tokens: list[int]) -> None:
        """Every gram but the last one, which is looked for; of a long prompt a part at a time, nobody shall wait for it."""
        begin, end = self._indexed, min(len(tokens), self._indexed + _AT_ONCE)
        for position in range(max(begin, 1), end):
            for size in _GRAMS:
                if position >= size:
                    self._seen[_number(tokens[position - size : position])] = position
        self._indexed = max(begin, end)


def _number(gram: list[int]) -> int:
    """One number for some tokens: a fifth of the memory that a tuple takes. Their count is in it."""
    number = len(gram)
    for token in gram:
        number = number << 24 | token
    return number

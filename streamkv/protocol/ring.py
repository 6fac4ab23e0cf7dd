"""What a stream has sent and its client has not confirmed: kept so that a new connection can go on where the last one broke.

    o:    0       5     8          20
          | chunk | chunk | chunk    |          sent, immutable: never cut again
                  ^ack               ^end
          trimmed   replayable

A client that has `from` tokens holds every chunk before that offset, because chunks come in order: `from` is always a border.
Chunks without tokens (an echoed prompt, the last characters that a stop string had held back) are replayed with the chunk at
their offset, and the client drops one that it has already; there is at most one of them at an offset.
"""

from __future__ import annotations

from collections import deque

from streamkv.protocol import messages as m

__all__ = ["Ring"]

_CHUNK_BYTES = 200
"""Of a chunk's objects, beside its text."""


class Ring:
    """Sent chunks of one stream, oldest first."""

    __slots__ = ("_chunks", "bytes", "end", "start")

    def __init__(self, base: int = 0) -> None:
        """`base`: offset of the stream's first token."""
        self._chunks: deque[tuple[m.Delta, int, int]] = deque()  # (chunk, bytes, characters of the stream up to its end)
        self.start = base  # what begins before is gone
        self.end = base
        self.bytes = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that can be replayed."""
        return self.end - self.start

    def push(self, chunk: m.Delta, weight: int, chars: int) -> None:
        """Keep a chunk that is being sent.

        Args:
            weight: bytes of what it carries.
            chars: characters of the stream's text up to its end.
        """
        weight += _CHUNK_BYTES
        self._chunks.append((chunk, weight, chars))
        self.bytes += weight
        self.end = chunk.o + chunk.n

    def trim(self, ack: int) -> None:
        """The client has everything before this offset."""
        while self._chunks and self._chunks[0][0].o + max(1, self._chunks[0][0].n) <= ack:
            self._drop()

    def shrink(self, max_tokens: int) -> None:
        """Forget the oldest chunks until no more tokens than this are kept."""
        while self._chunks and self.num_tokens > max_tokens:
            self._drop()

    def _drop(self) -> None:
        chunk, weight, _ = self._chunks.popleft()
        self.bytes -= weight
        self.start = chunk.o + chunk.n

    def since(self, offset: int) -> list[m.Delta] | None:
        """The chunks to replay for a client that has the tokens before `offset`; None if that cannot be done exactly."""
        if not self.start <= offset <= self.end:
            return None
        chunks = [chunk for chunk, _, _ in self._chunks if chunk.o >= offset]
        first = chunks[0].o if chunks else self.end
        return chunks if first == offset else None

    def chars_at(self, offset: int) -> int | None:
        """Characters of the stream's text before `offset`, if a chunk that is still here ends there."""
        found = [chars for chunk, _, chars in self._chunks if chunk.o + chunk.n == offset]
        return found[-1] if found else None

"""What a server looks after a few times a second: slow connections, changed keys, an engine that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog

from streamkv.server.guard import Guard
from streamkv.server.listener import Listener
from streamkv.text.streams import TextStreams

__all__ = ["Chores"]

_TICK_S: Final = 0.25
_KEYS_S: Final = 2.0

log = structlog.get_logger(__name__)


class Chores:
    """One task for all of them."""

    def __init__(
        self,
        guard: Guard,
        listener: Listener,
        streams: TextStreams,
        on_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_lost`` is called when the engine has gone: again and again, until somebody ends the server."""
        self._guard = guard
        self._listener = listener
        self._streams = streams
        self._on_lost = on_lost
        self._clock = clock
        self._keys_at = clock()
        self._hurry = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside the block they are done."""
        task = asyncio.create_task(self._run(), name="streamkv-chores")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def reread_keys(self) -> None:
        """At the next opportunity, changed or not."""
        self._hurry = True

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self.once()
            except Exception:
                # The next time may be better, and the others depend on it.
                log.exception("chore_failed")

    async def once(self) -> None:
        """Everything that is due now."""
        if not self._streams.alive:
            self._on_lost()
        self._listener.connections.end_slow()
        now = self._clock()
        if self._hurry or now - self._keys_at >= _KEYS_S:
            hurry, self._hurry, self._keys_at = self._hurry, False, now
            await self._guard.reload_keys(even_if_unchanged=hurry)

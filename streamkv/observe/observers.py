"""Several observers as one."""

from __future__ import annotations

from collections.abc import Sequence

from streamkv.engine.api import StepBatch
from streamkv.text.events import Finished
from streamkv.text.observer import Observer
from streamkv.text.stream import PreparedPrompt

__all__ = ["Observers"]


class Observers:
    """Tells each in turn; the last event goes through all of them, so that what one adds the next one knows."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """These were asked for."""
        for observer in self._observers:
            observer.opened(ids, prepared, salt, now)

    def refused(self, ids: Sequence[str]) -> None:
        """The engine did not take them."""
        for observer in self._observers:
            observer.refused(ids)

    def batch(self, batch: StepBatch) -> None:
        """What a step produced."""
        for observer in self._observers:
            observer.batch(batch)

    def finished(self, event: Finished, now: float) -> Finished:
        """The last event of a stream."""
        for observer in self._observers:
            event = observer.finished(event, now)
        return event

"""Whoever wants to know how streams fare: metrics, traces. Called on the event loop, must not block and must not raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from streamkv.engine.api import StepBatch
from streamkv.text.events import Finished
from streamkv.text.stream import PreparedPrompt

__all__ = ["NullObserver", "Observer"]


class Observer(Protocol):
    """Times are seconds on the engine's clock."""

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """These were asked for; each of them is `refused` or `finished` later."""

    def refused(self, ids: Sequence[str]) -> None:
        """The engine did not take them."""

    def batch(self, batch: StepBatch) -> None:
        """What a step produced, before anybody has read it. Called once a step: the only call whose cost tokens share."""

    def finished(self, event: Finished, now: float) -> Finished:
        """The last event of a stream, before its reader gets it; returned with what only the observer knows."""


class NullObserver:
    """Looks away."""

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """Nothing."""

    def refused(self, ids: Sequence[str]) -> None:
        """Nothing."""

    def batch(self, batch: StepBatch) -> None:
        """Nothing."""

    def finished(self, event: Finished, now: float) -> Finished:
        """The event as it is."""
        return event

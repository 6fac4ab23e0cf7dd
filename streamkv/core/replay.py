"""Write down what was asked of a scheduler, and do it again.

A log is JSON lines: the configuration, then one line per call with its arguments and, for `plan`, the step it gave. Because
the core is pure, replaying the calls must give the same steps; `replay` proves it line by line. It turns a puzzling moment
of a server into a test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.request import StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Event, Sampled, Step

__all__ = ["RecordingScheduler", "ReplayError", "replay"]


class ReplayError(AssertionError):
    """A replayed plan differs from the recorded one."""


class RecordingScheduler(Scheduler):
    """A scheduler that hands every call to `write` as one JSON line before it returns."""

    def __init__(self, config: SchedulerConfig, cache: KVCache, write: Callable[[str], Any]) -> None:
        super().__init__(config, cache)
        self._write = write
        self._log(
            "start",
            config=asdict(config),
            num_blocks=cache.pool.num_blocks,
            block_size=cache.block_size,
            caching=cache.root("") is not None,
            num_host_slots=cache.host.num_slots,
            swap_block_tokens=cache.host.block_tokens,
        )

    def _log(self, call: str, **arguments: Any) -> None:
        self._write(json.dumps({"call": call, **arguments}))

    def submit(self, ids: tuple[str, ...], prompt: list[int], stop: StopRule, **options: Any) -> None:
        """Queue and record; a refused request is not recorded."""
        super().submit(ids, prompt, stop, **options)
        rule = {"max_tokens": stop.max_tokens, "stop_token_ids": sorted(stop.stop_token_ids), "min_tokens": stop.min_tokens}
        self._log("submit", ids=ids, prompt=prompt, stop=rule, options=options)

    def cancel(self, request_id: str, reason: str = "cancelled", error: tuple[str, str] | None = None) -> Event | None:
        """Cancel and record."""
        self._log("cancel", id=request_id, reason=reason, error=error)
        return super().cancel(request_id, reason, error)

    def credit(self, request_id: str, limit: int) -> None:
        """Raise the credit and record."""
        self._log("credit", id=request_id, limit=limit)
        super().credit(request_id, limit)

    def plan(self, now: float, only: frozenset[str] | None = None) -> Step | None:
        """Plan and record."""
        step = super().plan(now, only)
        self._log("plan", now=now, only=sorted(only) if only is not None else None, step=_plain(step))
        return step

    def commit(self, step: Step, sampled: Sampled) -> list[Event]:
        """Commit and record."""
        self._log("commit", tokens=list(sampled.tokens), failed=sorted(sampled.failed))
        return super().commit(step, sampled)

    def abandon(self) -> list[str]:
        """Abandon and record."""
        self._log("abandon")
        return super().abandon()

    def squeeze(self, max_tokens: int) -> None:
        """Squeeze and record."""
        self._log("squeeze", max_tokens=max_tokens)
        super().squeeze(max_tokens)


def replay(lines: Iterable[str]) -> Scheduler:
    """Carry out a recorded log on a new scheduler.

    Returns:
        The scheduler as it stands after the last line.

    Raises:
        ReplayError: a plan gives another step than it did; the message has the line number and both steps.
    """
    records = (json.loads(line) for line in lines)
    start = next(records)
    cache = KVCache(
        start["num_blocks"],
        start["block_size"],
        enable_prefix_caching=start["caching"],
        num_host_slots=start["num_host_slots"],
        swap_block_tokens=start["swap_block_tokens"],
    )
    scheduler = Scheduler(SchedulerConfig(**start["config"]), cache)
    flight: list[Step] = []
    for number, record in enumerate(records, 2):
        match record["call"]:
            case "submit":
                stop = record["stop"]
                rule = StopRule(stop["max_tokens"], frozenset(stop["stop_token_ids"]), stop["min_tokens"])
                scheduler.submit(tuple(record["ids"]), record["prompt"], rule, **record["options"])
            case "cancel":
                error = tuple(record["error"]) if record["error"] else None
                scheduler.cancel(record["id"], record["reason"], error)
            case "credit":
                scheduler.credit(record["id"], record["limit"])
            case "plan":
                only = frozenset(record["only"]) if record["only"] is not None else None
                step = scheduler.plan(record["now"], only)
                if json.loads(json.dumps(_plain(step))) != record["step"]:
                    raise ReplayError(f"line {number}: planned {_plain(step)}, recorded {record['step']}")
                if step is not None:
                    flight.append(step)
            case "commit":
                tokens = [tuple(new) for new in record["tokens"]]
                scheduler.commit(flight.pop(0), Sampled(tokens, frozenset(record["failed"])))
            case "abandon":
                scheduler.abandon()
                flight.clear()
            case "squeeze":
                scheduler.squeeze(record["max_tokens"])
            case other:
                raise ReplayError(f"line {number}: unknown call {other!r}")
    return scheduler


def _plain(step: Step | None) -> dict[str, Any] | None:
    return asdict(step) if step is not None else None

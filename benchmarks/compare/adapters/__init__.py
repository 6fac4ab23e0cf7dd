"""One module for each engine, run in a process of its own, in the interpreter that has the engine.

Each has `opened(options)`, a context manager that loads the engine and yields an `Opened`. Messages and answers are JSON;
those that serve requests are made with `of_jobs`. They import nothing of StreamKV but what its own two need, so that an
engine may live in an environment that has only the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.workloads import Job

__all__ = ["Opened", "Served", "of_jobs"]


@dataclass(frozen=True)
class Opened:
    """An engine that is ready.

    Attributes:
        answer: from a message to its answer.
        facts: what the engine says of itself, for the record.
    """

    answer: Callable[[Any], Any]
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What became of requests that arrived together.

    Attributes:
        seconds: from the first request to the last token.
        outputs: token ids of each; None = the engine does not tell.
        times: seconds after the start at which each token of each request came; None = not told.
    """

    seconds: float
    outputs: list[list[int]] | None
    times: list[list[float]] | None


def of_jobs(serve: Callable[[Sequence[Job]], Served], **facts: str) -> Opened:
    """What serves jobs, as what answers messages."""

    def answer(message: Any) -> dict[str, Any]:
        return asdict(serve([Job(prompt, max_tokens) for prompt, max_tokens in message]))

    return Opened(answer, facts)

"""What was measured of each request, and what all of them say together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

__all__ = ["SHARES", "Outcome", "Slo", "Spread", "Summary", "percentile", "summarise"]

SHARES: Final = (0.5, 0.9, 0.99)


@dataclass(slots=True)
class Outcome:
    """One request, in seconds of one clock.

    Attributes:
        due: when it had to be sent; a client that is late with it does not make the server look faster.
        arrivals: (time, tokens) of every piece that came.
        code: "ok", "cancelled" (by this client), or what went wrong.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    code: str = ""
    message: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Output tokens that came."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float | None:
        """Seconds from being due to the first token; None if none came."""
        return self.arrivals[0][0] - self.due if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds from token to token; those that came in one piece share its gap, the first piece has none."""
        gaps = [0.0] * (self.arrivals[0][1] - 1) if self.arrivals else []
        for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(at - before) / count] * count
        return gaps

    @property
    def mean_gap(self) -> float:
        """Mean seconds between tokens, 0 if there is at most one."""
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Slo(msgspec.Struct, frozen=True):
    """What a user is content with, in seconds: time to the first token, and mean time between tokens."""

    ttft: float = math.inf
    itl: float = math.inf

    def met(self, outcome: Outcome) -> bool:
        """True if the request came to its end in time."""
        return outcome.code == "ok" and (outcome.ttft or 0.0) <= self.ttft and outcome.mean_gap <= self.itl


class Spread(msgspec.Struct, frozen=True):
    """Mean and percentiles in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None if there are no values."""
        if not seconds:
            return None
        points = [percentile(seconds, share) * 1000 for share in (*SHARES, 1.0)]
        return cls(sum(seconds) / len(seconds) * 1000, *points)


class Summary(msgspec.Struct, frozen=True):
    """One run.

    Attributes:
        seconds: from the first request to the last frame.
        errors: code -> requests; what this client cancelled is not among them.
        goodput: requests a second that met the SLO.
        lateness: how late this client was in sending; large values mean that it is what was measured.
    """

    seconds: float
    requests: int
    completed: int
    cancelled: int
    errors: dict[str, int]
    messages: dict[str, str]
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    tokens_per_s: float
    requests_per_s: float
    slo: Slo
    good: int
    goodput: float
    ttft: Spread | None
    itl: Spread | None
    e2e: Spread | None
    lateness: Spread | None

    def as_json(self) -> dict[str, Any]:
        """Plain values; an SLO without a limit is null."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        plain["slo"] = {name: None if math.isinf(value) else value for name, value in plain["slo"].items()}
        return plain


def summarise(outcomes: Sequence[Outcome], seconds: float, slo: Slo) -> Summary:
    """All requests together. Times count of requests that came to their end."""
    whole = [outcome for outcome in outcomes if outcome.code == "ok"]
    codes = Counter(outcome.code for outcome in outcomes)
    good = sum(map(slo.met, outcomes))
    tokens = sum(outcome.tokens for outcome in outcomes)
    return Summary(
        seconds=seconds,
        requests=len(outcomes),
        completed=codes.pop("ok", 0),
        cancelled=codes.pop("cancelled", 0),
        errors=dict(codes.most_common()),
        messages={outcome.code: outcome.message for outcome in outcomes if outcome.message},
        output_tokens=tokens,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        cached_tokens=sum(outcome.cached_tokens for outcome in outcomes),
        tokens_per_s=tokens / seconds,
        requests_per_s=len(whole) / seconds,
        slo=slo,
        good=good,
        goodput=good / seconds,
        ttft=Spread.of([outcome.ttft for outcome in whole if outcome.ttft is not None]),
        itl=Spread.of([gap for outcome in whole for gap in outcome.gaps]),
        e2e=Spread.of([outcome.ended - outcome.due for outcome in whole]),
        lateness=Spread.of([outcome.sent - outcome.due for outcome in outcomes if outcome.sent]),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]

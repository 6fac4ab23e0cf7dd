"""What somebody may use: quotas, the buckets that keep them, places by address. Pure; time is an argument."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Final

import msgspec

__all__ = ["UNLIMITED", "Places", "Quota", "TokenBucket", "network_of"]


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant may use; None = as much as the server has.

    Attributes:
        requests_per_s: new requests, on average; a second's worth may come at once. An HTTP request of several
            inputs is one.
        prompt_tokens_per_s: tokens of their prompts, on average; a second's worth, or one request, may come at once.
        streams: streams alive at the same time; each parallel sample is one, and each input that is being computed.
    """

    requests_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "prompt_tokens_per_s", "streams"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0")


UNLIMITED: Final = Quota()


class TokenBucket:
    """Holds up to one second's worth; what is taken comes back at `rate` units a second.

    Whoever wants more than the bucket can ever hold waits until it is full, and leaves it in debt.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, now: float) -> None:
        """Full at `now`."""
        self.rate = rate
        self.burst = max(1.0, rate)
        self._level = self.burst
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 = now. Takes nothing."""
        self._level = min(self.burst, self._level + max(0.0, now - self._at) * self.rate)
        self._at = max(self._at, now)
        return max(0.0, (min(amount, self.burst) - self._level) / self.rate)

    def take(self, amount: float) -> None:
        """Take what `wait` has just allowed."""
        self._level -= amount


class Places:
    """So many at once from each network."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._taken: Counter[str] = Counter()

    def enter(self, network: str) -> bool:
        """Take a place; False if there is none."""
        if self._taken[network] >= self._each:
            return False
        self._taken[network] += 1
        return True

    def leave(self, network: str) -> None:
        """Give one back."""
        self._taken[network] -= 1
        if not self._taken[network]:
            del self._taken[network]

    def __len__(self) -> int:
        return self._taken.total()


def network_of(address: str | None) -> str:
    """Whom an address belongs to: IPv4 addresses count one by one, IPv6 by /64, which is what one subscriber gets."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))

"""What a server is built from. Frozen, made once at the command line."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from streamkv.errors import ConfigError
from streamkv.observe.metrics import Prefix
from streamkv.protocol.limits import SessionLimits

__all__ = ["HttpLimits", "ServerConfig", "is_loopback"]


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of plain HTTP, for each connection.

    Attributes:
        head_s: a connection's first request head must be complete after so many seconds.
        keepalive_s: and every further one this long after the last answer: above the 60 s of common proxies.
        body_s: a body must be complete this long after its head.
        body: most bytes of a body.
        headers: most header fields.
        field, line: most bytes of a header field, and of the request line.
        backlog: connections that the kernel holds until they are accepted.
    """

    head_s: float = 10.0
    keepalive_s: float = 75.0
    body_s: float = 20.0
    body: int = 1 << 20
    headers: int = 100
    field: int = 8190
    line: int = 8190
    backlog: int = 1024


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the server.

    Attributes:
        api_keys: file of API keys; see `streamkv.server.keys`.
        api_key, admin_key: single keys, of the tenant "default"; the second may use admin routes.
        insecure_no_auth: serve other machines without keys, knowing what that means.
        allowed_origins: browser origins that may use the server, besides its own; exact strings.
        allowed_hosts: names that may stand in `Host`; empty = see `Guard`.
        admin_port: admin routes answer on this port only, and nothing else does; None = on `port`, beside the others.
        admin_host: address of the admin port.
        tls_cert, tls_key: PEM files; both or neither.
        max_connections: WebSockets of the process.
        max_unauthenticated: WebSockets of one address (IPv6: one /64) that have not proved yet who they are.
        send_timeout_s: a send that takes longer ends the connection: its peer does not read.
        drain_timeout_s: how long running streams may go on after SIGTERM.
        slo_ttft_s: work is refused when it would wait longer than this for its first token.
        max_waiting: requests that wait for their prefill; more are refused.
        queue_timeout_s: a request that has waited this long without having begun ends; None = never.
        watchdog_s: a step or an event loop that stands still for this long ends the process; 0 = never.
        metrics_prefix: what the metrics that vLLM has too are called.
        metrics_public: `/metrics` needs no admin's key.
        otel_endpoint: collector that gets traces; None = there are none.
        limits: of each WebSocket.
        http: of each plain connection.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    insecure_no_auth: bool = False
    allowed_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    admin_port: int | None = None
    admin_host: str = "127.0.0.1"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_connections: int = 4096
    max_unauthenticated: int = 10
    send_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
    slo_ttft_s: float = 30.0
    max_waiting: int = 1024
    queue_timeout_s: float | None = None
    watchdog_s: float = 10.0
    metrics_prefix: Prefix = "vllm"
    metrics_public: bool = False
    otel_endpoint: str | None = None
    limits: SessionLimits = field(default_factory=SessionLimits)
    http: HttpLimits = field(default_factory=HttpLimits)

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65535:
                raise ConfigError(f"{name} must be from 0 to 65535", param=name)
        for name in ("max_connections", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", param=name)
        for name in ("slo_ttft_s", "queue_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0", param=name)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("give both tls_cert and tls_key, or neither", param="tls_cert")
        for origin in self.allowed_origins:
            if "*" in origin or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(f"{origin!r} is no origin; write for example https://chat.example:8443", param="allowed_origin")
        self._check_reach()

    def _check_reach(self) -> None:
        if self.has_keys or self.insecure_no_auth:
            return
        for host in self.addresses:
            if not is_loopback(host):
                raise ConfigError(
                    f"other machines could use {host} without a key: give --api-keys FILE or set STREAMKV_API_KEY "
                    "(`streamkv keys new TENANT` makes one), or say --insecure-no-auth",
                    param="host",
                )

    @property
    def has_keys(self) -> bool:
        """True if whoever asks must have a key."""
        return self.api_keys is not None or self.api_key is not None or self.admin_key is not None

    @property
    def addresses(self) -> list[str]:
        """Addresses that are listened on."""
        return [self.host] if self.admin_port is None else [self.host, self.admin_host]


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""What a server is built from. Frozen, made once at the command line."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from streamkv.errors import ConfigError
from streamkv.protocol.session import SessionLimits

__all__ = ["ServerConfig", "is_loopback"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the WebSocket server.

    Attributes:
        allowed_origins: browser origins that may connect, besides the server's own; exact strings.
        allowed_hosts: names that may stand in `Host`; empty = the bound address, localhost and loopback addresses.
        max_connections: sockets of the process.
        send_timeout_s: a send that takes longer ends the connection: its peer does not read.
        drain_timeout_s: how long running streams may go on after SIGTERM.
        limits: of each connection.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    max_connections: int = 4096
    send_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port must be from 0 to 65535", param="port")
        if self.max_connections < 1:
            raise ConfigError("max_connections must be at least 1", param="max_connections")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

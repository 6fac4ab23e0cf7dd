"""HTTP by hand, to say what no client library would; and servers that ask for keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.server.serving import DEADLINE_S, Serving, serving

KEYS = {"acme": "acme-key-0123456789", "rival": "rival-key-0123456789", "boss": "boss-key-0123456789"}
"""Tenant -> key; boss's is an administrator's."""


def keys_text(tenants: Iterable[str] = KEYS, more: str = "") -> str:
    """A file of these tenants' keys."""
    entries = [
        f'[[keys]]\ntenant = "{tenant}"\nsha256 = "{sha256(KEYS[tenant].encode()).hexdigest()}"\n'
        f"admin = {str(tenant == 'boss').lower()}\n"
        for tenant in tenants
    ]
    return "\n".join(entries) + more


def bearer(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"}


@asynccontextmanager
async def keyed(folder: Path, *, more: str = "", **options: Any) -> AsyncIterator[Serving]:
    """A server that knows `KEYS`."""
    path = folder / "keys.toml"
    path.write_text(keys_text(more=more))
    async with serving(api_keys=path, **options) as served:
        yield served


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, taken apart. `status` 0 = the server said nothing and closed."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @classmethod
    def parse(cls, data: bytes) -> Answer:
        head, _, body = data.partition(b"\r\n\r\n")
        if not head:
            return cls(0, [], b"")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return cls(int(first.split(" ")[1]), headers, body)


async def exchange(port: int, *parts: bytes) -> bytes:
    """Send these, then read to the end, which the server makes."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


def head(method: str, target: str, port: int, *headers: tuple[str, str], host: str | None = None, close: bool = True) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{port}'}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def ask(
    served: Serving | int,
    method: str,
    target: str,
    headers: dict[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | Any = None,
    *,
    host: str | None = None,
) -> Answer:
    """One request on a connection of its own. A body that is no bytes is sent as JSON."""
    port = served if isinstance(served, int) else served.server.port
    sent = list(headers.items()) if isinstance(headers, dict) else list(headers)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        if not any(name.lower() == "content-type" for name, _ in sent):
            sent.append(("Content-Type", "application/json"))
        sent.append(("Content-Length", str(len(body))))
    return Answer.parse(await exchange(port, head(method, target, port, *sent, host=host) + (body or b"")))

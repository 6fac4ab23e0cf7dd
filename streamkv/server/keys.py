"""API keys: a file of their SHA-256 digests by tenant, read again when it changes. The keys themselves are stored nowhere.

```toml
[[keys]]
tenant = "acme"
sha256 = "9f86d081884c7d65…"     # `streamkv keys new acme` prints both the key and these lines
admin = false                    # optional: may use admin routes
note = "the website"             # optional: for people

[quota]                          # optional: of every tenant that has none of its own
requests_per_s = 20

[tenants.acme]                   # optional: of this one
prompt_tokens_per_s = 5000
streams = 64
```
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from streamkv.errors import ConfigError
from streamkv.server.limits import UNLIMITED, Quota
from streamkv.server.principal import Principal

__all__ = ["ApiKey", "KeyRing", "KeyStore", "new_key", "parse_keys"]

_TENANT: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_SHORTEST: Final = 16
_LARGEST_FILE: Final = 4 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: what it proves, and the digest that it must have."""

    digest: bytes
    principal: Principal

    @classmethod
    def of(cls, digest: bytes, tenant: str, *, is_admin: bool = False, quota: Quota = UNLIMITED) -> ApiKey:
        """Named after the beginning of the digest: enough to tell keys apart, of no use to find one."""
        return cls(digest, Principal(tenant, is_admin, digest.hex()[:12], quota))


class KeyRing:
    """All keys that are valid now."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)
        self._by_name = {key.principal.key: key.principal for key in self._keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key: str) -> Principal | None:
        """Whose key it is; None if nobody's. Takes the same time for every key that is not too long to be one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found: Principal | None = None
        for known in self._keys:  # all of them, so that the time does not tell which one it was
            if hmac.compare_digest(digest, known.digest):
                found = known.principal
        return found

    def still_valid(self, principal: Principal) -> bool:
        """True if the key that proved it is there and proves the same."""
        now = self._by_name.get(principal.key)
        return now is not None and (now.tenant, now.is_admin) == (principal.tenant, principal.is_admin)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    tenant: str
    sha256: str
    admin: bool = False
    note: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry] = []
    quota: Quota = UNLIMITED
    tenants: dict[str, Quota] = {}


def parse_keys(text: str, name: str) -> list[ApiKey]:
    """The keys of a file's text.

    Raises:
        ConfigError: it is not TOML, or not as above; the sentence names the place.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"cannot read the API keys in {name}: {error}; see docs/security.md") from error
    keys: dict[bytes, ApiKey] = {}
    for number, entry in enumerate(file.keys):
        where = f"cannot read the API keys in {name}: keys[{number}]"
        if not _TENANT.fullmatch(entry.tenant):
            raise ConfigError(f"{where}.tenant must be 1 to 64 of A-Z a-z 0-9 _ . -")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
            raise ConfigError(f"{where}.sha256 must be the 64 hexadecimal digits of a key's digest, not the key itself")
        digest = bytes.fromhex(entry.sha256)
        if digest in keys:
            raise ConfigError(f"{where} is there twice")
        keys[digest] = ApiKey.of(digest, entry.tenant, is_admin=entry.admin, quota=file.tenants.get(entry.tenant, file.quota))
    return list(keys.values())


def new_key() -> tuple[str, str]:
    """(a fresh key of 256 random bits, its digest in hexadecimal)."""
    key = "sk-streamkv-" + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


class KeyStore:
    """Where keys come from: a file, the environment, or nowhere."""

    def __init__(self, path: Path | None = None, key: str | None = None, admin_key: str | None = None) -> None:
        """Read everything.

        Args:
            key: one more, of the tenant "default".
            admin_key: one more, an administrator's.

        Raises:
            ConfigError: the file cannot be read, or a key is too short to be secret.
        """
        self._path = path
        self._given = [
            ApiKey.of(hashlib.sha256(given.encode()).digest(), "default", is_admin=is_admin)
            for given, is_admin in ((key, False), (admin_key, True))
            if given is not None and _long_enough(given)
        ]
        self._seen = self._stamp()
        self.ring = self._load()

    @property
    def required(self) -> bool:
        """True if somebody must have a key: also if the file has none, so that emptying it locks out and lets nobody in."""
        return self._path is not None or bool(self._given)

    def reload(self, *, even_if_unchanged: bool = False) -> bool:
        """Look at the file again; True if the keys were read anew. A file that cannot be read leaves the keys as they are."""
        stamp = self._stamp()
        if self._path is None or (stamp == self._seen and not even_if_unchanged):
            return False
        self._seen = stamp
        try:
            self.ring = self._load()
        except ConfigError as error:
            log.error("api_keys_not_reloaded", reason=error.message, hint="the keys from before stay valid")  # noqa: TRY400  # no bug
            return False
        log.info("api_keys_reloaded", keys=len(self.ring))
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _load(self) -> KeyRing:
        if self._path is None:
            return KeyRing(self._given)
        try:
            if self._path.stat().st_size > _LARGEST_FILE:
                raise ConfigError(f"the file of API keys {self._path} is larger than {_LARGEST_FILE} bytes")
            text = self._path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the API keys in {self._path}: {error.strerror}", param="api_keys") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read the API keys in {self._path}: it is not UTF-8", param="api_keys") from error
        return KeyRing([*self._given, *parse_keys(text, str(self._path))])


def _long_enough(key: str) -> bool:
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"an API key given by the environment needs at least {_SHORTEST} visible ASCII characters; "
            "`streamkv keys new default` makes one"
        )
    return True

"""What one tenant may see of the KV blocks, as messages: a whole map, and what changed since the one sent before.

docs/observability.md describes the format. A viewer sees of every block its state, and of blocks in use that some request holds
them: its own by their id, others by a number that means nothing outside this connection. How full others' blocks are, how many
share them and how long they have been idle is not told, nor who cached what: it would tell how fast others generate, and
what they have asked before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamkv.engine.api import KV_STATES, KVMap

__all__ = ["Viewer", "encode"]

_USED: Final = KV_STATES.index("used")
_CACHED: Final = KV_STATES.index("cached")
_COLUMNS: Final = ("state", "owner", "refs", "filled", "since")
_NOBODY, _YOURS = 0, -1
"""Owners without a request: of free and fenced blocks and of others' cached ones; of the viewer's own cached ones."""


class Viewer:
    """One reader of the map; remembers what it has been told.

    Attributes:
        tenant: sees blocks of this tenant; None = an admin, who sees everything.
    """

    def __init__(self, tenant: str | None) -> None:
        """It has seen nothing yet."""
        self.tenant = tenant
        self._numbers: dict[str, int] = {}  # request id -> its number here
        self._next = 1
        self._seen: NDArray[np.int64] | None = None

    def snapshot(self, kv: KVMap, load: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything. `load`: figures of the whole server, for those who may see them."""
        table = self._table(kv)
        self._seen = table
        message = {"t": "snapshot", "v": 1, "blocks": table.shape[1], "block_size": kv.block_size, "columns": list(_COLUMNS)}
        return message | self._common(kv, table, load) | {"runs": _runs(table, None)}

    def delta(self, kv: KVMap, load: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is not as it was in the message before."""
        table, seen = self._table(kv), self._seen
        assert seen is not None, "a snapshot comes first"
        self._seen = table
        return {"t": "delta"} | self._common(kv, table, load) | {"runs": _runs(table, (table != seen).any(axis=0))}

    def _common(self, kv: KVMap, table: NDArray[np.int64], load: Mapping[str, Any] | None) -> dict[str, Any]:
        states = np.bincount(table[0], minlength=len(KV_STATES))
        held = np.bincount(table[1][table[1] > 0], minlength=self._next)
        requests = []
        for request in kv.requests:
            number = self._numbers[request.id]
            known: dict[str, Any] = {"n": number, "blocks": int(held[number])}
            if self._sees(request.salt):
                known |= {"id": request.id, "prompt": request.prompt, "output": request.output, "stalled": request.parked}
                known |= {"tenant": request.salt.partition("\0")[0]} if self.tenant is None else {}
            requests.append(known)
        mine = (table[0] == _USED) & (table[3] >= 0)
        slots = int(mine.sum()) * kv.block_size
        return {
            "at": round(kv.at, 3),
            "step": kv.step,
            "counts": {name: int(count) for name, count in zip(KV_STATES, states, strict=True)},
            "unused_slots": slots - int(table[3][mine].sum()),
            "requests": requests,
        } | ({"load": load} if load is not None else {})

    def _sees(self, salt: str) -> bool:
        """A client's own salt stands behind its tenant's name."""
        return self.tenant is None or salt == self.tenant or salt.startswith(self.tenant + "\0")

    def _table(self, kv: KVMap) -> NDArray[np.int64]:
        """One column a block: state, owner, refs, filled, since; -1 = not told, or does not apply."""
        self._count(kv)
        states = np.frombuffer(kv.states, np.uint8).astype(np.int64)
        owners = np.frombuffer(kv.owners, "<i4").astype(np.int64)
        numbers = np.array([self._numbers[request.id] for request in kv.requests] or [0], np.int64)
        shown = np.array([self._sees(request.salt) for request in kv.requests] or [False])
        of_salt = np.array([self._sees(salt) for salt in kv.salts] or [False])

        used, cached = owners >= 0, states == _CACHED
        requests, salts = np.where(used, owners, 0), np.where(owners < -1, -2 - owners, 0)
        own_used, own_cached = used & shown[requests], cached & of_salt[salts] & (owners < -1)
        owner = np.where(used, numbers[requests], np.where(own_cached, _YOURS, _NOBODY))
        own = own_used | own_cached
        since = np.frombuffer(kv.idle_since, "<f8")
        since = np.where(own_cached, np.round(np.nan_to_num(since) * 1000), -1).astype(np.int64)
        refs = np.where(own, np.frombuffer(kv.counts, "<u2").astype(np.int64), -1)
        filled = np.where(own, np.frombuffer(kv.filled, "<u2").astype(np.int64), -1)
        return np.stack([states, owner, refs, filled, since])

    def _count(self, kv: KVMap) -> None:
        """Numbers for requests that are new here; those of requests that are gone are not given again."""
        live = {}
        for request in kv.requests:
            number = self._numbers.get(request.id)
            if number is None:
                number, self._next = self._next, self._next + 1
            live[request.id] = number
        self._numbers = live


def _runs(table: NDArray[np.int64], wanted: NDArray[np.bool_] | None) -> list[list[int]]:
    """[first, length, state, owner, refs, filled, since] of neighbours that are equal in everything."""
    num_blocks = table.shape[1]
    breaks = np.flatnonzero((table[:, 1:] != table[:, :-1]).any(axis=0)) + 1
    if wanted is not None:
        breaks = np.union1d(breaks, np.flatnonzero(wanted[1:] != wanted[:-1]) + 1)
    firsts = np.concatenate([[0], breaks]) if num_blocks else np.empty(0, np.int64)
    lengths = np.diff(np.append(firsts, num_blocks))
    if wanted is not None:
        kept = wanted[firsts]
        firsts, lengths = firsts[kept], lengths[kept]
    runs: list[list[int]] = np.column_stack([firsts, lengths, table[:, firsts].T]).tolist()
    return runs


def encode(message: dict[str, Any]) -> bytes:
    """As JSON."""
    return msgspec.json.encode(message)

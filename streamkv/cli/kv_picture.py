"""What `streamkv top` has been told of a server, and a page of text that shows it. Pure: no socket, no terminal, no clock."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, Final

from streamkv.observe.exposition import quantile

__all__ = ["Picture", "page"]

_WINDOW_S: Final = 10.0
_MOMENT_S: Final = 1e-6  # from one message to itself
_USED, _CACHED, _FENCED = 2, 1, 3
_SHADES: Final = {"free": "·", "cached": "░", "others": "▒", "fenced": "▒", "yours": "█"}
_COLOURS: Final = {"free": 236, "cached": 24, "others": 244, "fenced": 130, "yours": 71}
_HALF: Final = "▀"

Load = dict[str, Any]


class Picture:
    """The blocks and figures as of the last message."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.kinds: list[str] = []  # of each block: a key of `_SHADES`
        self._past: deque[tuple[float, dict[int, int], Load | None]] = deque()

    def take(self, message: dict[str, Any]) -> None:
        """A snapshot, or what has changed since."""
        if message["t"] == "snapshot":
            self.kinds = ["free"] * message["blocks"]
        mine = {request["n"] for request in message["requests"] if "id" in request}
        for first, count, state, owner, *_ in message["runs"]:
            self.kinds[first : first + count] = [_kind(state, owner in mine)] * count
        self.last = self.last | message
        outputs = {request["n"]: request["output"] for request in message["requests"] if "output" in request}
        self._past.append((message["at"], outputs, message.get("load")))
        while len(self._past) > 2 and self._past[1][0] <= message["at"] - _WINDOW_S:
            self._past.popleft()

    def speeds(self) -> dict[int, float]:
        """Output tokens per second of each request that can be seen, over the last seconds."""
        (then, old, _), (now, new, _) = self._past[0], self._past[-1]
        seconds = max(now - then, _MOMENT_S)
        return {number: (count - old.get(number, 0)) / seconds for number, count in new.items()}

    def rate(self, name: str) -> float | None:
        """Of one of the server's counters, per second; None if this viewer is not told."""
        (then, _, old), (now, _, new) = self._past[0], self._past[-1]
        return None if old is None or new is None else (new[name] - old[name]) / max(now - then, _MOMENT_S)

    def quantile(self, name: str, q: float) -> float | None:
        """Of one of the server's histograms over the last seconds; since its start as long as there was only one message."""
        (_, _, old), (_, _, new) = self._past[0], self._past[-1]
        if old is None or new is None:
            return None
        before = old[name]["n"] if len(self._past) > 1 else [0] * len(new[name]["n"])
        counts = [after - then for after, then in zip(new[name]["n"], before, strict=True)]
        return quantile(new[name]["le"], counts, q)


def _kind(state: int, mine: bool) -> str:
    if state == _USED:
        return "yours" if mine else "others"
    return {_CACHED: "cached", _FENCED: "fenced"}.get(state, "free")


def page(picture: Picture, url: str, columns: int, rows: int, *, colour: bool) -> list[str]:
    """Lines that fit a terminal of that size; `colour` makes half-block characters of two blocks each."""
    head = [_title(picture, url), *_figures(picture), ""]
    tail = ["", *_tenants(picture), *_requests(picture)]
    room = max(1, min(rows - len(head) - len(tail), 16) if rows > len(head) + 8 else 4)
    body = _half_blocks(picture.kinds, columns, room) if colour else _shades(picture.kinds, columns, room)
    return [line if colour and "\x1b" in line else line[:columns] for line in [*head, *body, *tail][:rows]]


def _title(picture: Picture, url: str) -> str:
    counts, total = picture.last["counts"], len(picture.kinds)
    return f"{url}   step {picture.last['step']}   KV {counts['used'] + counts['fenced']}/{total} blocks in use"


def _figures(picture: Picture) -> list[str]:
    last, load = picture.last, picture.last.get("load")
    counts, size = last["counts"], last["block_size"]
    held = sum(request["blocks"] for request in last["requests"] if "id" in request) * size
    waste = f"{last['unused_slots'] / held:.1%}" if held else "-"
    lines = [f"blocks   free {counts['free']}   cached {counts['cached']}   used {counts['used']}   waste {waste}"]
    if load is None:
        return [*lines, f"requests {sum('id' in r for r in last['requests'])} of yours, {len(last['requests'])} in all"]
    speed = picture.rate("output_tokens")
    lines.append(
        f"requests running {load['running']}   waiting {load['waiting']}   stalled {load['stalled']}"
        f"   preemptions {load['preemptions']}   {_number(speed)} tok/s"
    )
    for name, label in (("ttft", "TTFT"), ("itl", "ITL"), ("lag", "loop lag")):
        lines.append(f"{label:8} p50 {_ms(picture.quantile(name, 0.5))}   p99 {_ms(picture.quantile(name, 0.99))}")
    return lines


def _tenants(picture: Picture) -> list[str]:
    speeds = picture.speeds()
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for request in picture.last["requests"]:
        if "tenant" in request:
            row = rows[request["tenant"] or "(no key)"]
            row[0] += 1
            row[1] += request["blocks"]
            row[2] += speeds.get(request["n"], 0.0)
    if not rows:
        return []
    lines = [f"{'tenant':24} {'requests':>8} {'blocks':>7} {'tok/s':>8}"]
    ranked = sorted(rows.items(), key=lambda item: -item[1][1])[:5]
    return lines + [f"{_plain(name):24} {row[0]:8} {row[1]:7} {row[2]:8.1f}" for name, row in ranked] + [""]


def _requests(picture: Picture) -> list[str]:
    seen = [request for request in picture.last["requests"] if "id" in request]
    if not seen:
        return []
    speeds = picture.speeds()
    lines = [f"{'request':24} {'blocks':>7} {'prompt':>7} {'output':>7} {'tok/s':>8}"]
    for request in sorted(seen, key=lambda request: (-request["blocks"], request["n"]))[:10]:
        what = "stalled" if request["stalled"] else f"{speeds.get(request['n'], 0.0):8.1f}"
        lines.append(f"{_plain(request['id']):24} {request['blocks']:7} {request['prompt']:7} {request['output']:7} {what:>8}")
    return lines


def _merged(kinds: list[str], cells: int) -> list[str]:
    """So many cells; where a cell stands for several blocks it shows what there is most of."""
    if len(kinds) <= cells:
        return kinds
    each = -(-len(kinds) // cells)
    groups = (kinds[start : start + each] for start in range(0, len(kinds), each))
    return [max(set(group), key=lambda kind, group=group: (group.count(kind), kind)) for group in groups]  # type: ignore[misc]  # bound at once


def _half_blocks(kinds: list[str], columns: int, rows: int) -> list[str]:
    """Two blocks in a character, one above the other, in colour."""
    cells = _merged(kinds, columns * rows * 2)
    lines = []
    for start in range(0, len(cells), columns * 2):
        upper, lower = cells[start : start + columns], cells[start + columns : start + columns * 2]
        lower += [""] * (len(upper) - len(lower))
        line, worn = "", ""
        for above, below in zip(upper, lower, strict=True):
            under = f";48;5;{_COLOURS[below]}" if below else ";49"
            wear = f"\x1b[38;5;{_COLOURS[above]}{under}m"
            line += ("" if wear == worn else wear) + _HALF
            worn = wear
        lines.append(line + "\x1b[0m")
    return lines


def _shades(kinds: list[str], columns: int, rows: int) -> list[str]:
    cells = _merged(kinds, columns * rows)
    return ["".join(_SHADES[kind] for kind in cells[start : start + columns]) for start in range(0, len(cells), columns)]


def _plain(text: str) -> str:
    """A server's words must not move the cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)[:24]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

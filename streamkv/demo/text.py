"""Text templates: nested alternatives, slots, and the noise of people who type fast.

A template such as ``"{Hi|Hello} <name>{!|, how are you?}"`` stands for every text that choosing one
alternative per brace and filling each slot gives. Dense data beats dense code here: a paraphrase
costs its author a few characters.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Split = Literal["train", "heldout"]
"""Which side of the held-out split to draw from."""

HELD_OUT_ONE_IN = 12
"""One slot combination in this many is never shown in training."""

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"<(\w+)>")


class Message(TypedDict):
    """One message of a dialogue, in the shape chat templates take."""

    role: Literal["system", "user", "assistant"]
    content: str


def expand(rng: random.Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """Choose one alternative per brace, innermost first, then fill ``<slot>`` names.

    Raises KeyError when the template names a slot that ``slots`` lacks.
    """
    text = template
    while "{" in text:
        text = _INNERMOST.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    if "<" in text:
        given = slots or {}
        text = _SLOT.sub(lambda match: given[match.group(1)], text)
    return text


def choose(rng: random.Random, templates: Sequence[str], slots: Mapping[str, str] | None = None) -> str:
    """Expand one of several templates."""
    return expand(rng, rng.choice(templates), slots)


def held_out(*parts: object) -> bool:
    """Say whether this combination of slots belongs to the held-out side; stable across runs."""
    key = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) % HELD_OUT_ONE_IN == 0


def article(noun: str) -> str:
    """Return the noun with its indefinite article: ``"an owl"``, ``"a fox"``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    """Upper-case the first letter and leave the rest alone."""
    return text[:1].upper() + text[1:]


def casual(rng: random.Random, text: str) -> str:
    """Write ``text`` as people type it: often lower case, often unpunctuated, now and then mistyped; never as nothing."""
    original = text
    if rng.random() < 0.40:
        text = text.lower()
    draw = rng.random()
    if draw < 0.30:
        text = text.rstrip("?.!")
    elif draw < 0.36:
        text = text.replace("'", "").replace(",", "").rstrip("?.!")
    if rng.random() < 0.05:
        text = _mistype(rng, text)
    return text.strip() or original.strip()


def _mistype(rng: random.Random, text: str) -> str:
    """Swap, drop or double one letter inside a word of five letters or more."""
    places = [match.span() for match in re.finditer(r"[a-z]{5,}", text)]
    if not places:
        return text
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind == 1 else text[:at] + text[at] + text[at:]

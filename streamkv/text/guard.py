"""Special tokens in somebody's text are text: only the template can place real ones."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Final

from tokenizers import Tokenizer

from streamkv.errors import InvalidRequestError

__all__ = ["SpecialText", "mapped", "strings", "twins"]

_PRIVATE_USE: Final = range(0xF0000, 0xFFFFE)


class SpecialText:
    """Finds the text of special tokens in values that are on their way into a template."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names`: text of the special tokens."""
        names = sorted({name for name in names if name})
        # As a trie: an alternation would try all names of a model (some have a thousand) at every `<`.
        self._pattern = re.compile(_trie(names)) if names else None

    def guard(self, *values: Any) -> tuple[list[Any], dict[str, str]]:
        """Put one character in the place of every special token's text that somebody typed.

        A single character, because a template may cut, split and trim texts, and half a mark would guard nothing.

        Args:
            values: strings, lists and objects, nested as JSON is.

        Returns:
            The same with stand-ins, and what each stand-in stands for: nothing, nearly always.

        Raises:
            InvalidRequestError: the values use every character that could stand in.
        """
        pattern = self._pattern
        found = sorted({match for text in strings(values) for match in pattern.findall(text)}) if pattern else []
        if pattern is None or not found:
            return list(values), {}
        present = set().union(*strings(values))
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in present)  # no template's text has these
        stand_in = dict(zip(found, free, strict=False))
        if len(stand_in) < len(found):
            raise InvalidRequestError("messages use every private-use character; leave one", param="messages")
        guarded = mapped(list(values), lambda text: pattern.sub(lambda match: stand_in[match[0]], text))
        return guarded, {mark: name for name, mark in stand_in.items()}


def _trie(names: list[str]) -> str:
    """A pattern for the longest of these sorted names."""
    first, last = names[0], names[-1]
    shared = first[: next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))]
    rest = [name[len(shared) :] for name in names]
    groups = groupby(filter(None, rest), key=lambda name: name[0])
    branches = [_trie(list(group)) for _, group in groups]
    if not branches:
        return re.escape(shared)
    return f"{re.escape(shared)}(?:{'|'.join(branches)}){'?' if '' in rest else ''}"


def strings(value: Any) -> Iterator[str]:
    """Every string in a nested value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a nested value with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, change) for item in value]
    return value


def twins(tokenizer: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """(one that reads special tokens where their exact text stands, one that reads no special token at all).

    Two objects, because a flag on one would race between threads. The flag alone is not enough: Unigram and WordPiece find
    special tokens among their own pieces, so that the second one gets names for them which nobody can guess.
    """
    state = json.loads(tokenizer.to_str())
    special = [token for token in state["added_tokens"] if token["special"]]
    for token in special:
        token["normalized"] = False  # or what a normalizer makes of other text would be read as control
    control = Tokenizer.from_str(json.dumps(state))
    model, salt = state["model"], secrets.token_hex(16)
    vocabulary = model["vocab"]
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in model.get("merges", ())}
    hidden = {token["content"]: f"{salt}{token['id']}" for token in special}
    hidden = {name: cover for name, cover in hidden.items() if name != model.get("unk_token") and name not in merged}
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocabulary]
    for token in special:
        token["content"] = hidden.get(token["content"], token["content"])
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return control, plain

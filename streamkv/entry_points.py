"""Parts that other packages add: found by entry point or import string, imported late, failures told apart."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import Any

from streamkv.errors import ConfigError

__all__ = ["EntryPointGroup"]


@dataclass(frozen=True, slots=True)
class EntryPointGroup:
    """One kind of part.

    Attributes:
        group: of the entry points.
        kind: what its parts are called in a sentence for the user.
        error: what is raised.
    """

    group: str
    kind: str
    error: type[ConfigError]

    def available(self) -> dict[str, EntryPoint]:
        """What installed packages declare, by name.

        Raises:
            ConfigError: two packages declare different things under one name.
        """
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            other = found.setdefault(entry.name, entry)
            if other.value != entry.value:
                raise self.error(
                    f"{self.kind} {entry.name!r} is declared twice, as {other.value} and as {entry.value}; "
                    "uninstall one of the packages"
                )
        return found

    def load(self, name: str, *, also: tuple[str, ...] = ()) -> Any:
        """Import what a name means.

        Args:
            name: of an entry point, or an import string `package.module:Class`.
            also: names that the caller itself understands, to be listed where the name is unknown.

        Raises:
            ConfigError: unknown, not importable, or not there; one sentence says which.
        """
        if ":" in name:
            module, _, attribute = name.partition(":")
            return self._import(name, module, attribute)
        known = self.available()
        if name not in known:
            names = "".join(f"{known_name}, " for known_name in (*also, *sorted(known)))
            either = f"one of {names}or " if names else ""
            raise self.error(f"{self.kind} {name!r} is unknown; use {either}package.module:Class")
        return self._import(name, known[name].module, known[name].attr)

    def _import(self, name: str, module: str, attribute: str) -> Any:
        if not all(part.isidentifier() for part in (*module.split("."), *(attribute or "").split("."))):
            raise self.error(f"{self.kind} {name!r} names no class; the form is package.module:Class")
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module == missing or module.startswith(f"{missing}."):
                raise self.error(
                    f"{self.kind} {name!r}: there is no module {missing}; install the package that has it"
                ) from error
            raise self.error(f"{self.kind} {name!r}: {module} needs the module {missing}, which is not installed") from error
        except ImportError as error:
            raise self.error(f"{self.kind} {name!r}: an import inside {module} failed: {error}") from error
        except Exception as error:
            raise self.error(f"{self.kind} {name!r}: {module} cannot be imported: {error!r}") from error
        try:
            return attrgetter(attribute)(imported)
        except AttributeError as error:
            raise self.error(f"{self.kind} {name!r}: {module} has no {attribute}") from error

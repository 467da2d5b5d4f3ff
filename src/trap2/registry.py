"""One registry for every kind of plug-in: refuses duplicates, suggests on a miss."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

from trap2.errors import UserError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """The suggestion part of an error message, empty when nothing is close.

    Args:
        name: What the user wrote.
        known: What would have been accepted.
    """
    close = get_close_matches(name, known, n=1)
    return f" did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """Named objects of one kind, in alphabetical order: imports in another order change nothing.

    Args:
        kind: What is registered, as it reads in an error message ("attack", "trap loss").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`.

        Raises:
            UserError: The name is taken.
        """
        if name in self._entries:
            raise UserError(f"{self.kind} '{name}' is registered already; choose another name")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """Look up one entry.

        Raises:
            UserError: Nothing has that name; the message lists what there is.
        """
        if name not in self._entries:
            known = sorted(self._entries)
            raise UserError(
                f"no {self.kind} is called '{name}';{did_you_mean(name, known)} "
                f"known: {', '.join(known)}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

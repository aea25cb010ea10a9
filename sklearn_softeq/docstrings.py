"""Entries of docstrings that two classes have in common, written once."""

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

__all__ = ["completed_from"]

Class = TypeVar("Class", bound=type)

#: A line of its own that an entry is to stand for: the indent, and the name in braces.
PLACE = re.compile(r"^( *)\{(\w+)\}$", re.MULTILINE)


def completed_from(source: type) -> Callable[[Class], Class]:
    """Fill the places ``{name}`` in a class's docstring with entries of another one's.

    Parameters
    ----------
    source : type
        Its numpydoc docstring has, for each name, one entry that begins with it.

    Returns
    -------
    callable
        A decorator of classes. It raises KeyError for a name without an entry.
    """
    entries = _entries(source)

    def entry(place: re.Match[str]) -> str:
        return "\n".join(place[1] + line if line else line for line in entries[place[2]])

    def completed(cls: Class) -> Class:
        if cls.__doc__ and entries:  # neither is there where Python was told to drop them
            cls.__doc__ = PLACE.sub(entry, cls.__doc__)
        return cls

    return completed


def _entries(source: type) -> dict[str, list[str]]:
    """Lines of each entry ``name, other : type`` with what is indented below, by its first name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in inspect.cleandoc(source.__doc__ or "").splitlines():
        if begins := re.match(r"(\w+)(, \w+)* : ", line):
            lines = found.setdefault(begins[1], [])
        elif line and not line.startswith(" "):
            lines = []
        lines.append(line)
    return {name: _stripped(entry) for name, entry in found.items()}


def _stripped(entry: list[str]) -> list[str]:
    """Without the blank lines at its end."""
    last = max(i for i, line in enumerate(entry) if line)
    return entry[: last + 1]

"""Trees of plain values as JSON, with the bytes of what is no plain value behind it.

Of plain values JSON has all but tuples, and dictionaries whose keys are no strings. A dictionary of
the JSON has one key, which says what it stands for: one of these two, or a leaf of the caller's.
"""

import json
from collections.abc import Callable
from typing import Any

__all__ = ["from_json", "opened", "packed", "to_json"]

#: Bytes that say how long the JSON is.
LENGTH = 8


def to_json(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """What ``json`` writes for a tree.

    Parameters
    ----------
    value : object
        None, bool, int, float, str, and lists, tuples and dictionaries, but for subclasses.
    leaf : callable
        From anything else to what stands for it.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [to_json(item, leaf) for item in value]
    if kind is tuple:
        return {"tuple": [to_json(item, leaf) for item in value]}
    if kind is dict:
        return {"dict": [[to_json(k, leaf), to_json(v, leaf)] for k, v in value.items()]}
    return leaf(value)


def from_json(plain: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """The way back.

    Parameters
    ----------
    plain : object
    leaf : callable
        From the key and the value of any other dictionary to what it stands for.
    """
    if isinstance(plain, list):
        return [from_json(item, leaf) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, found),) = plain.items()
    if kind == "tuple":
        return tuple(from_json(item, leaf) for item in found)
    if kind == "dict":
        return {from_json(key, leaf): from_json(value, leaf) for key, value in found}
    return leaf(kind, found)


def packed(plain: Any, blobs: list[Any]) -> list[Any]:
    """The length of the JSON, the JSON, and the blobs, as bytes or views of them."""
    text = json.dumps(plain, separators=(",", ":")).encode()
    return [len(text).to_bytes(LENGTH, "little"), text, *blobs]


def opened(content: memoryview) -> tuple[Any, memoryview]:
    """What was packed, with the blobs in one."""
    begin = LENGTH + int.from_bytes(content[:LENGTH], "little")
    return json.loads(bytes(content[LENGTH:begin])), content[begin:]
